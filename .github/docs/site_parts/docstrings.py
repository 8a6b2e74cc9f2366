"""Docstrings as they are written here, for Sphinx.

A docstring in the package is plain text in Google's style: what is indented is a formula or code
and stays as it is, and a ``*`` or ``|`` in a sentence is that sign and no markup. A public name
whose docstring has no example is given that of ``api/examples.txt``.
"""

import re

from sphinx.application import Sphinx

from site_parts import reference

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields|Example|Examples|Note):$")
CODE = re.compile(r"(``.+?``|https?://[^\s)]+|(?<!\S)\*\w+\*)", re.DOTALL)  # or a word in stars
PYTHON = re.compile(r"\bjp\.|^\s*(def|class|return|for) ", re.MULTILINE)


def escaped(block: list[str]) -> list[str]:
    """Return lines whose signs are no markup, but for what stands in double backquotes."""
    parts = CODE.split("\n".join(block))
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*|`\\])", r"\\\1", parts[index])
        parts[index] = re.sub(r"(\w)_(?!\w)", r"\1\\_", parts[index])
    return "".join(parts).split("\n")


def _doctest(block: list[str]) -> bool:
    return block[0].lstrip().startswith(">>>")


def as_rst(lines: list[str]) -> list[str]:
    """Return the reStructuredText of a docstring, with its sections left for napoleon."""
    result: list[str] = []
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    in_section = in_code = False
    for block in filter(None, blocks):
        indented = block[0].startswith("    ")
        goes_on, in_code = in_code and indented, False
        if not indented:
            in_section = bool(SECTION.match(block[0]))
        if _doctest(block) or block[0].startswith("Example"):
            result += [*block, ""]
        elif indented and not in_section:
            lexer = "python" if PYTHON.search("\n".join(block)) else "text"
            result += [*([] if goes_on else [f".. code-block:: {lexer}", ""]), *block, ""]
            in_code = True
        else:
            result += [*escaped(block), ""]
    return result


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    text = "\n".join(lines)
    lines[:] = as_rst(lines)
    example = reference.EXAMPLES.get(name.removeprefix("jaxprop."))
    if ">>>" not in text and example is not None:
        lines += ["", "Example:", "", *(f"    {line}" for line in example.splitlines()), ""]


def _shorter(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    arguments: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Write ``Array`` for the module path at which jaxlib keeps it."""

    def short(text: str | None) -> str | None:
        return text and re.sub(r"\b(jaxlib\._jax|jax|jaxprop)\.(?=[\w.]*\bArray\b)", "", text)

    return short(arguments), short(returned)


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object):
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _shorter)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
