"""The site's sources: every name on a page exists, and every name has its place and an example.

Nothing is built here: the workflow builds the site, with warnings as errors.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
from pathlib import Path

import pytest

import jaxprop as jp
from jaxprop.bench.rows import ROWS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / ".github" / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.*")])
PAGE = DOCS / "quantities.md"
TEXT = PAGE.read_text()
NAMES = set(re.findall(r"\bjp((?:\.[A-Za-z_]\w*)+)", TEXT))


@pytest.fixture
def site(monkeypatch):
    """Make the site's own modules importable."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_a_page_is_there(page):
    text = page.read_text()
    for name in re.findall(r"(?<![\w.])jp((?:\.[A-Za-z_]\w*)+)", text):
        functools.reduce(getattr, name[1:].split("."), jp)
    assert len(NAMES) > 50


def test_every_quantity_and_every_function_of_a_curvature_is_in_the_page():
    def is_quantity(value):
        return isinstance(value, type) and issubclass(value, jp.Quantity)

    quantities = {n for n in jp.quantity.__all__ if is_quantity(getattr(jp.quantity, n))}
    assert {"AddedUp", "Clipped", "KroneckerFactors"} <= quantities
    last = {name.rpartition(".")[2] for name in NAMES}
    assert quantities <= last
    assert {f".curvature.{name}" for name in jp.curvature.__all__} <= NAMES


def test_the_tests_the_rows_and_the_files_that_it_names_are_there():
    for path in set(re.findall(r"`(tests/\w+\.py)`", TEXT)):
        assert (ROOT / path).is_file(), path
    for path in set(re.findall(r"\]\(([^)#]+)", TEXT)):
        assert (PAGE.parent / path).is_file(), path
    table = (DOCS / "figures.md").read_text().split("$ jaxprop bench\n")[1].split("```")[0]
    found = {line.split()[0]: line.split()[3] for line in table.splitlines()[2:] if "[" in line}
    quoted = re.findall(r"(\d+\.\d\d)(?:(?![|;]|\d\.\d\d).)*?`([\w/-]+)`", TEXT)
    quoted = [(ratio, row) for ratio, row in quoted if row in ROWS]
    assert len(quoted) > 15
    for ratio, row in quoted:
        assert found[row] == ratio, row


def public():
    """The ids of the objects that the reference has to list, in the package and in its modules."""
    modules = (jp.curvature, jp.forms, jp.models, jp.plot, jp.quantity, jp.rules)
    values = {id(getattr(module, name)) for module in modules for name in module.__all__}
    values |= {id(value) for value in vars(jp.sharding).values() if is_of(value, jp.sharding)}
    return values | {id(value) for name, value in vars(jp).items() if is_public(name, value)}


def is_of(value, module):
    own = getattr(value, "__module__", None) == module.__name__
    return inspect.isfunction(value) and own and not value.__name__.startswith("_")


def is_public(name, value):
    return not name.startswith("_") and not inspect.ismodule(value)


def test_every_public_name_is_in_the_reference_once_and_has_an_example(site):
    from site_parts import reference

    listed = reference.listed()
    assert len(listed) == len(set(listed))
    values = {name: functools.reduce(getattr, name.split("."), jp) for name in listed}
    assert {id(value) for value in values.values()} == public()
    without = {name for name, value in values.items() if ">>>" not in value.__doc__}
    assert without == set(reference.EXAMPLES)


def test_every_public_name_names_its_arguments_or_fields(site):
    from site_parts import reference

    for name in reference.listed():
        value = functools.reduce(getattr, name.split("."), jp)
        if inspect.isfunction(value):
            named = list(inspect.signature(value).parameters)
        elif dataclasses.is_dataclass(value):
            named = [field.name for field in dataclasses.fields(value)]
        else:
            named = getattr(value, "_fields", ())
        said = re.split("Args:|Attributes:", value.__doc__, maxsplit=1)[-1]
        missing = {it for it in named if not re.search(rf"\b{it}\b", said)}
        assert not missing, (name, missing)


def test_what_the_page_says_of_the_tests_is_what_they_run(site):
    from site_parts import tested

    written = TEXT.partition(tested.BEGIN)[2].partition(tested.END)[0]
    assert written == tested.tables(), "run `python .github/docs/build.py --tables`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_a_page_can_be_read(page):
    for cell in re.findall(r"```(?:\{code-cell\}|python)\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(cell)
        assert max(map(len, cell.splitlines())) <= 100


def test_both_languages_have_the_same_code():
    def code(name):
        cells = re.findall(r"```\{code-cell\}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
        return [ast.dump(ast.parse(cell)) for cell in cells]  # without the comments

    assert code("cotangent.md") == code("cotangent.ko.md")


def test_the_gallery_has_every_example(site):
    from site_parts import gallery

    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    shared = {"checkpoints", "corpus", "images", "options", "scanning", "watching"}
    assert {name for _, name in gallery.PLACES} == scripts - shared
    assert {path.stem for path in (DOCS / "recorded").glob("*.txt")} <= scripts
