"""Run the examples of ``api/examples.txt``: ``python -m site_parts.doctests``."""

import doctest
import sys
from typing import Any

from site_parts import reference


def run() -> list[str]:
    """Run each example after the setup, and return what failed, in doctest's words."""
    text = (reference.API / "examples.txt").read_text()
    setup = text.partition("[setup]\n")[2].partition("\n== ")[0]
    parser = doctest.DocTestParser()
    before: dict[str, Any] = {}
    for line in parser.get_examples(setup):
        exec(line.source, before)
    failures: list[str] = []
    for name, lines in reference.EXAMPLES.items():
        test = parser.get_doctest(f"{lines}\n", dict(before), name, "api/examples.txt", 0)
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append)
    return failures


if __name__ == "__main__":
    sys.exit("".join(run()) or None)
