"""Text that is elsewhere in the repository, quoted in a page: ``<!-- quote: FILE ## Heading -->``.

Without a heading it is the file without its first heading; with one, what is below it.
"""

import posixpath
import re

from sphinx.application import Sphinx

from site_parts.links import ROOT, on_the_site

MARK = re.compile(r"^<!-- quote: (\S+?)(?: (#+ .+?))? -->$", re.MULTILINE)


def quoted(path: str, heading: str | None) -> str:
    """Return Markdown of a file of the repository, or of one of its sections."""
    text = (ROOT / path).read_text()
    if heading is None:
        return on_the_site(re.sub(r"\A# .*\n", "", text), posixpath.dirname(path))
    level = heading.index(" ")
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    rest = re.split(rf"^#{{1,{level}}} ", text[start:], maxsplit=1, flags=re.MULTILINE)[0]
    return on_the_site(rest, posixpath.dirname(path))


def _quote(app: Sphinx, docname: str, source: list[str]) -> None:
    def replaced(match: re.Match[str]) -> str:
        app.env.note_dependency(str(ROOT / match[1]), docname=docname)
        return quoted(match[1], match[2])

    source[0] = MARK.sub(replaced, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _quote, priority=950)  # its links are those of its own folder
    return {"parallel_read_safe": True, "parallel_write_safe": True}
