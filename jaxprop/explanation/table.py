"""An explanation as text, for a terminal of 80 columns or for a pipe."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jaxprop.core.types import PyTree
from jaxprop.explanation.numerals import aligned, bracketed, fixed, share, short
from jaxprop.explanation.summary import Summary, rms_of_all
from jaxprop.explanation.terms import Explanation, Scope, Terms

WIDTH = 80
NUMBERS = 5  # how many numbers of an array are written out
WEIGHTS = 12  # how many weights of a param are written out
NAME = 21  # characters of a scope's name


def plainly(explanation: Explanation) -> str:
    """Return the explanation as a string, without colours."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(explanation)):
        return f"<explanation of {explanation.net}, being traced>"
    out = io.StringIO()
    console = Console(
        file=out, width=WIDTH, color_system=None, highlight=False, force_jupyter=False
    )
    console.print(table(explanation))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(explanation: Explanation) -> Group:
    """Return the explanation for a rich console.

    If whole arrays were kept, it shows the terms of the example in view, else a line per layer.
    """
    explanation = jax.device_get(explanation)
    examples = f"{explanation.examples} example{'' if explanation.examples == 1 else 's'}"
    if explanation.loss.kept is None:
        first = f"{explanation.loss.layer}: {fixed(explanation.value)}, the mean over {examples}"
        return Group(Text(first), "", _summaries(explanation))
    value = fixed(explanation.loss.y[explanation.shown])
    first = f"{explanation.loss.layer}: {value} for example {explanation.shown} of {examples}"
    return Group(Text(first), *map(_text, _lines(explanation)))


def _summaries(explanation: Explanation) -> Table:
    """Return a table with a line for each layer."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("layer", no_wrap=True, overflow="ellipsis", max_width=23)
    for name in ("mean y", "rms y", "max |y|", "zeros", "sat.", "rms ct", "rms d_w", "bad"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for name, terms in explanation.runs():
        s = terms.summaries
        y = [""] * 4 if s.y is None else [*map(short, (s.y.mean, s.y.rms, s.y.max))]
        y = y if s.y is None else [*y, share(s.y.zeros)]
        slope = "" if s.saturated is None else share(s.saturated)
        ct = "" if s.ct is None else short(s.ct.rms)
        drawn.add_row(f"{name} {terms.layer}".strip(), *y, slope, ct, _rms(s.grads), _bad(terms))
        for scope in terms.scopes:
            drawn.add_row(*_of_scope(scope))
    return drawn


def _of_scope(scope: Scope) -> list[str]:
    """Return the cells of a line for one named scope."""
    y = [*map(short, (scope.y.mean, scope.y.rms, scope.y.max)), share(scope.y.zeros)]
    made = [scope.y, scope.ct, *([] if scope.grads is None else [scope.grads])]
    return [
        "  " + _end_of(scope.name),
        *y,
        "",
        short(scope.ct.rms),
        _rms(scope.grads),
        _count(made),
    ]


def _end_of(name: str) -> str:
    """Return the end of a name that is too long for its column."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def _rms(summaries: PyTree) -> str:
    rms = rms_of_all(summaries)
    return "" if rms is None else short(rms)


def _bad(terms: Terms) -> str:
    """Return the number of elements of y, d_x and the gradients that are not finite."""
    s = terms.summaries
    made = jax.tree.leaves((s.y, s.d_x, s.grads), is_leaf=lambda node: isinstance(node, Summary))
    return _count(made)


def _count(made: Sequence[Summary]) -> str:
    count = sum(int(one.nonfinite) for one in made)
    return str(count) if count < 10_000 else f"{count:.0e}"


def _lines(explanation: Explanation) -> Iterator[str]:
    """Yield the arrays of each layer for the example in view, and the chain of every weight."""
    n = explanation.shown
    for name, terms in explanation.runs():
        yield ""
        yield f"{name} {terms.layer}".strip()
        for what in ("x", "y", "slope", "ct", "d_x"):
            for path, array in jax.tree.leaves_with_path(getattr(terms, what)):
                place = jax.tree_util.keystr(path, simple=True, separator=".")
                yield f"  {'.'.join(filter(None, (what, place))):<7} {_vector(array[n])}"
        for scope in terms.scopes:
            yield f"  {scope.name}"
            for what, array in zip(("y", "ct"), scope.kept or (), strict=False):
                yield f"    {what:<5} {_vector(array[n])}"
        alone = dataclasses.replace(explanation, net=terms.layer, collected=terms)
        for param in alone.names:
            yield from _weights(alone, param)


def _weights(alone: Explanation, name: str) -> Iterator[str]:
    """Yield the lines of one param, in an explanation of its layer alone."""
    param = alone[name]
    indices = list(np.ndindex(*np.shape(param.value)))
    if param.terms.forms is None:
        yield f"  {name:<8}{_vector(param.value)}"
        yield f"  {'grad':<8}{_vector(param.grad)}"
        return
    for index in indices[:WEIGHTS]:
        factors, product = param[index]
        label = f"{name}[{', '.join(map(str, index))}]"
        numbers = {key: bracketed(fixed(f)) for key, f in factors.items() if not np.ndim(f)}
        chain = " · ".join(f"{key} {number}" for key, number in numbers.items())
        if not chain:
            over = next((f"{np.size(f)} positions" for f in factors.values()), "")
            chain = " ".join(filter(None, ["Σ", " · ".join(factors), "over", over])) if over else ""
        equals = f"{chain} = " if chain else "∂E = "
        yield f"  {label:<14} {fixed(param.value[index]):>11}   {equals}{fixed(product)}"
    if len(indices) > WEIGHTS:
        yield f"  … and {len(indices) - WEIGHTS} more of {name}, {np.shape(param.value)}"


def _vector(array: ArrayLike) -> str:
    numbers = np.asarray(array, np.float64).ravel()
    text = " ".join(f"{number:>11}" for number in aligned(numbers[:NUMBERS]))
    shape = "×".join(map(str, np.shape(array)))
    return text if numbers.size <= NUMBERS else f"{text} … {shape}"


def _text(line: str) -> Text:
    return Text(line, style="" if line.startswith("  ") else "bold", overflow="ellipsis", end="\n")
