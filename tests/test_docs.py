"""The page of quantities: every name in it exists, and every quantity is in it."""

import functools
import re
from pathlib import Path

import jaxprop as jp
from jaxprop.bench.rows import ROWS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / ".github" / "docs" / "quantities.md"
TEXT = PAGE.read_text()
NAMES = set(re.findall(r"\bjp((?:\.[A-Za-z_]\w*)+)", TEXT))


def test_every_name_in_the_page_is_there():
    assert len(NAMES) > 50
    for name in NAMES:
        functools.reduce(getattr, name[1:].split("."), jp)


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
    table = (ROOT / "README.md").read_text().split("$ jaxprop bench\n")[1].split("```")[0]
    found = {line.split()[0]: line.split()[3] for line in table.splitlines()[2:] if "[" in line}
    quoted = re.findall(r"(\d+\.\d\d)(?:(?![|;]|\d\.\d\d).)*?`([\w/-]+)`", TEXT)
    quoted = [(ratio, row) for ratio, row in quoted if row in ROWS]
    assert len(quoted) > 15
    for ratio, row in quoted:
        assert found[row] == ratio, row
