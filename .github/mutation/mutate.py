"""Mutation testing: change one place, run the tests that reach it, print what survives.

    python .github/mutation/mutate.py record reached.json tests/test_axes.py tests/test_errors.py
    python .github/mutation/mutate.py run reached.json jaxprop/layers/axes.py --each 7

JAX is imported once, and each mutant is a fork that imports jaxprop with one place changed.
"""

import argparse
import ast
import json
import os
import random
import signal
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import coverage
import jax  # noqa: F401  imported once, for all forks
import pytest
from sites import sites

OPTIONS = ["-q", "-n0", "-p", "no:cacheprovider"]
SECONDS = 40  # of tests for a mutant


class Recorded:
    """A plugin of pytest that records which tests reach each line, and how long they take."""

    def __init__(self):
        self.coverage = coverage.Coverage(data_file=None, source=["jaxprop"])
        self.coverage.start()
        self.seconds = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        start = time.time()
        result = yield
        self.seconds[item.nodeid] = time.time() - start
        return result

    def reached(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {os.path.relpath(f): data.contexts_by_lineno(f) for f in data.measured_files()}
        return json.dumps({"lines": lines, "seconds": self.seconds})


class Chosen:
    """A plugin of pytest that runs the tests that reach the lines, the fastest first."""

    def __init__(self, reached, file, lines):
        each, took = reached["lines"].get(str(file), {}), reached["seconds"]
        tests = {test for line in lines for test in each.get(str(line), ())} - {""}
        tests = tests or {test for those in each.values() for test in those} - {""}
        ends, total = {}, 0.0
        for test in sorted(tests, key=took.__getitem__):
            ends[test] = total = total + took[test]
        self.order = {test: end for test, end in ends.items() if end <= SECONDS + took[test]}
        self.files = sorted({test.partition("::")[0] for test in self.order})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])


def import_instead(file, source):
    """Import the file from this source."""
    loader, path = SourceFileLoader, os.path.abspath(file)
    read, stats = loader.get_data, loader.path_stats
    loader.get_data = lambda self, name: source if name == path else read(self, name)
    loader.path_stats = lambda self, name: stats(self, "" if name == path else name)  # no bytecode


def outcome(file, source, tests):
    """Run the tests on the mutant in a fork."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(60 + 5 * SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            import_instead(file, source)
            code = int(pytest.main([*OPTIONS, "-x", *tests.files], plugins=[tests]))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "survived", 5: "untested", -signal.SIGALRM: "timeout"}.get(code, "killed")


def run(reached, files, each, seed):
    for file in files:
        source = file.read_bytes()
        lines, places = source.splitlines(keepends=True), list(sites(ast.parse(source)))
        count = min(round(each * (len(places) / 100) ** 0.5), len(places))
        for _, node, text in random.Random(f"{seed} {file}").sample(places, count):
            start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
            stop = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
            changed = source[:start] + text.encode() + source[stop:]
            tests = Chosen(reached, file, range(node.lineno, node.end_lineno + 1))
            found = outcome(file, changed, tests) if tests.order else "untested"
            print(f"{found} {file}:{node.lineno}: {source[start:stop].decode()} -> {text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=["record", "run"])
    add("reached", type=Path, help="the JSON file of which test reaches what")
    add("paths", nargs="+", type=Path, help="tests to record, or files to mutate")
    add("--each", type=float, default=7, help="mutants of a file of 100 places")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "run":
        run(json.loads(args.reached.read_text()), args.paths, args.each, args.seed)
        return
    recorded = Recorded()
    pytest.main([*OPTIONS, *map(str, args.paths)], plugins=[recorded])
    args.reached.write_text(recorded.reached())


if __name__ == "__main__":
    main()
