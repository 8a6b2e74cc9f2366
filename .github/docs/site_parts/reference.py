"""What the pages of the reference list, and the examples: read from ``api/``, without Sphinx."""

import re
from pathlib import Path

API = Path(__file__).parent.parent / "api"


def examples() -> dict[str, str]:
    """Return the examples of ``api/examples.txt`` by their names."""
    parts = re.split(r"^== ([\w.]+)\n", (API / "examples.txt").read_text(), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def listed() -> list[str]:
    """Return the names that the pages of the reference list, in their order."""
    text = "".join(path.read_text() for path in sorted(API.glob("*.rst")))
    blocks = re.findall(r"^\.\. names::((?: .*\n|\n(?= ))(?:   .*\n)*)", text, re.MULTILINE)
    return " ".join(blocks).split()


EXAMPLES = examples()
