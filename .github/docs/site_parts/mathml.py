"""Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx


def mathml(tex: str, as_block: bool = False) -> str:
    r"""Return a formula of TeX as MathML.

    Docutils wants braces where TeX takes the next sign, as in ``\frac1N``, and lets the bars of a
    norm grow, which lifts its exponent.
    """
    braced = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}", tex)
    text = tex2mathml(braced, as_block=as_block)
    return re.sub(
        r"<mo(?: class=\"math\w+\")?>([‖|⟨⟩])</mo>", r'<mo stretchy="false">\1</mo>', text
    )


def _inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
