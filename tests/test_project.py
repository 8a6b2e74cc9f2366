"""The project's promises: imports only go downwards, the README's code runs, names exist."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import jaxprop as jp

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"_command", "core"},
    {"layers", "combinators", "losses", "checking", "quantity"},
    {"traced"},
    {"curvature", "births", "sharding"},
    {"forms", "models", "training", "explanation"},
    {"plot", "bench", "walkthrough", "rules"},
    {"cli"},
    {"__main__"},
]
PEERS = ("torch", "opacus", "backpack")  # packages that some files need and tests do without
PARTS = [part for floor in FLOORS for part in floor]


def part(path):
    return path.relative_to(ROOT / "jaxprop").with_suffix("").parts[0]


def imports(path):
    """Yield (module, line) of every import of jaxprop in the file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "jaxprop":
                yield name, node.lineno


FILES = [path for path in sorted((ROOT / "jaxprop").rglob("*.py")) if part(path) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    here = part(path)
    assert here in floor, f"{path} has no floor in this test"
    for name, line in imports(path):
        there = name.split(".")[1]
        assert there in floor, f"{path}:{line} imports {name} from the package's face"
        if there != here:
            assert floor[there] < floor[here], f"{path}:{line}: {here} imports {name}, going up"


def test_the_floors_are_those_of_the_package():
    assert sorted(set(map(part, FILES))) == sorted(PARTS)


@pytest.mark.usefixtures("standard_promotion")
def test_readme_code_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 18
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    out = capsys.readouterr().out
    assert float(re.search(r"loss (\S+)", out).group(1)) < 1.0
    assert float(re.findall(r"held out (\S+)%", out)[-1]) > 90
    assert len(blocks[0].strip().splitlines()) <= 11
    assert len([line for line in blocks[6].splitlines() if line]) <= 15
    text = (ROOT / "README.md").read_text()
    assert re.search(r"```text\n(\(Affine.*)\n```", text).group(1) in out.splitlines()
    path, line, source = re.search(
        r"born in dot_general at (\S+):(\d+):\n    (.*)\n", text
    ).groups()
    assert (ROOT / path).read_text().splitlines()[int(line) - 1].strip() == source
    table = re.search(r"```text\n(\d+ params, .*?)```", text, re.DOTALL).group(1)
    lines = re.sub(r"linear\.py:\S+", "linear.py:…", table).splitlines()  # differs between versions
    assert set(lines) <= set(re.sub(r"linear\.py:\S+", "linear.py:…", out).splitlines())


def test_readme_shows_what_the_command_prints(capsys):
    from jaxprop.cli import main

    main([])
    shown = re.search(
        r"```text\n(Back to.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    ).group(1)
    assert shown in capsys.readouterr().out


def test_ci_runs_the_readme_s_test_command():
    (command,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "pytest" in line
    ]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def public():
    """Yield every public name and its value."""
    names = ("curvature", "forms", "models", "quantity", "rules", "sharding")
    modules = [jp, *(getattr(jp, name) for name in names)]
    for module in modules:
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name)
            if not name.startswith("_") and not inspect.ismodule(value):
                yield name, value


def test_every_public_name_is_there_and_documented():
    for name, value in public():
        if getattr(value, "__module__", "").startswith("jaxprop"):
            text = value.__doc__
            assert text, name
            assert not text.startswith(f"{name}("), f"{name} has only what dataclasses write"


def test_the_top_level_completes_to_what_a_user_types():
    names = dir(jp)
    assert names == sorted(jp.__all__)
    assert len(names) <= 100
    text = jp.__doc__.split("by group:")[1]
    assert set(names) <= set(re.findall(r"\w+", text)), "the docstring lists the names by group"


def test_no_function_hides_a_module():
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not name.endswith("__main__"):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name not in PEERS:
                    raise
                continue
            above, _, last = name.rpartition(".")
            if above:
                assert getattr(importlib.import_module(above), last) is module, name


def test_heavy_libraries_are_not_imported():
    import subprocess
    import sys

    heavy = ("torch", "flax", "equinox", "sklearn", "matplotlib", "jinja2", "orbax", "pytest")
    code = f"import sys, jaxprop, jaxprop.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
