"""Links: from a name in code to its place in the reference, and from a file to its page."""

import os
import posixpath
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import jaxprop as jp
from site_parts import gallery

ROOT = Path(__file__).parent.parent.parent.parent
PAGES = {
    "README.md#how-fast": "/bench.md",
    "README.md": "/index.md",
    "examples/README.md#the-plan": "/plan.md",
    "examples/README.md": "/gallery/index.rst",
    "examples/coming_from.md": "/coming_from.md",
    "examples/peers": "/bench.md",
    ".github/docs/quantities.md": "/quantities.md",
    ".github/CONTRIBUTING.md": "/contributing.md",
    **{f"examples/{name}.py": f"/gallery/{group}/{name}.rst" for group, name in gallery.PLACES},
}


def on_the_site(text: str, folder: str) -> str:
    """Return Markdown of a folder of the repository, with its links as they are on the site.

    A file that is no page here is looked at where the repository is published, if the workflow
    says where; else its name stays, without a link.
    """

    def link(match: re.Match[str]) -> str:
        shown, target = match.groups()
        if re.match(r"(https?:|#|/|mailto:)", target):
            return match.group()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        page = PAGES.get(f"{path}#{anchor}") or PAGES.get(path)
        if page:
            return f"[{shown}]({page})"
        if path.startswith(".github/docs/") and (ROOT / path).exists():
            return f"[{shown}](/{path.removeprefix('.github/docs/')})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"a link to {path}, which is not in the repository")
        if "GITHUB_REPOSITORY" in os.environ:
            server, name = os.environ["GITHUB_SERVER_URL"], os.environ["GITHUB_REPOSITORY"]
            return f"[{shown}]({server}/{name}/blob/{os.environ['GITHUB_SHA']}/{path})"
        return shown

    return re.sub(r"\[([^\]\[]+)\]\(([^)\s]+)\)", link, text)


def _names_to_the_reference(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    objects = app.env.domains["py"].objects  # pyright: ignore[reportAttributeAccessIssue]
    for node in list(doctree.findall(nodes.literal)):
        match = re.match(r"jp\.([A-Za-z_][\w.]*)", node.astext())
        if match is None or isinstance(node.parent, nodes.reference):
            continue
        entry = next((objects[it] for it in _full_names(match[1]) if it in objects), None)
        if entry is not None:
            there = entry.docname, entry.node_id
            node.parent.replace(node, make_refnode(app.builder, docname, *there, node.deepcopy()))


def _full_names(name: str) -> list[str]:
    last = name.rpartition(".")[2]
    modules = [f"jaxprop.{module}.{last}" for module in ("quantity", "forms")]
    return [f"jaxprop.{name}", *(modules if hasattr(jp, last) else [])]


def _pages_of_this_folder(app: Sphinx, docname: str, source: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        folder = posixpath.join(".github/docs", posixpath.dirname(docname))
        source[0] = on_the_site(source[0], folder)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _pages_of_this_folder, priority=900)
    app.connect("doctree-resolved", _names_to_the_reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
