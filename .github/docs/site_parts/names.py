"""The public names by concept: what a page of the reference lists, and an example of each.

``.. names:: Dense Relu`` writes a table of the names with their first sentences, and then each of
them with its docstring. ``api/examples.txt`` has an example for those whose docstring has none.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from site_parts import reference
from site_parts.docstrings import escaped


def value_of(name: str) -> Any:
    """Return what a name of ``jaxprop`` is, such as ``forms.Sum``."""
    module, _, last = f"jaxprop.{name}".rpartition(".")
    return getattr(importlib.import_module(module), last)


def first_sentence(value: Any) -> str:
    """Return the first sentence of a docstring, as reStructuredText."""
    paragraph = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.:])\s", paragraph)[0].rstrip(":")
    return " ".join(escaped([sentence]))


WORDS = {"Parameters": "Args", "Variables": "Attributes"}  # Sphinx's, and a docstring's


class Names(SphinxDirective):
    """``.. names:: A B``: the table of some names, and each with its docstring."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        for path in (reference.API / "examples.txt", *Path(__file__).parent.glob("*.py")):
            self.env.note_dependency(str(path))
        names = self.arguments[0].split()
        lines = [".. list-table::", "   :class: names", "   :widths: auto", ""]
        for name in names:
            lines += [f"   * - :py:obj:`jp.{name} <jaxprop.{name}>`"]
            lines += [f"     - {first_sentence(value_of(name))}"]
        for name in names:
            kind = "class" if inspect.isclass(value_of(name)) else "function"
            lines += ["", f".. auto{kind}:: jaxprop.{name}"]
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), 0, parent)
        return parent.children


def _as_typed(app: Sphinx, doctree: nodes.document) -> None:
    """Write ``jp.`` where Sphinx writes the module's name, and the words of the docstrings."""
    for node in doctree.findall(nodes.field_name):
        if node.astext() in WORDS:
            node.children = [nodes.Text(WORDS[node.astext()])]
    for node in doctree.findall(addnodes.desc_addname):
        text = re.sub(r"^jaxprop\b", "jp", node.astext())
        node.children = [nodes.Text(text)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("names", Names)
    app.connect("doctree-read", _as_typed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
