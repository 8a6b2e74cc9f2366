"""The coverage of a function: which params keep their cotangents as factors, and where."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxprop.core.tree import is_not_learned
from jaxprop.core.types import Params
from jaxprop.traced.equations import Convolution
from jaxprop.traced.example import Example
from jaxprop.traced.taps import LookUp, MatrixProduct, Meeting, Use

WIDTH = 80
LARGE = 2**26  # bytes of gradients formed per example, above which to warn
FORMS: dict[type[Meeting], str] = {MatrixProduct: "Outer", Convolution: "Patches", LookUp: "Rows"}


@dataclasses.dataclass(frozen=True)
class Covered:
    """The coverage of one param.

    Attributes:
        param: its path.
        shape: its shape.
        form: the form of its cotangent: "Outer", "Patches", "Rows", "Repeated(…)" in a scan over
            layers or a batched product, "per example" (``Stacked``, or ``Sum`` for a vector),
            several of these with a plus between them, "unused", or "not learned".
        meets: for each place where it meets data, the primitive, the source line and the scope.
        own_bytes: the memory that the gradients of all examples of the batch take, formed or not.
        owned: whether they are formed.
    """

    param: str
    shape: tuple[int, ...]
    form: str
    meets: tuple[tuple[str, str, str], ...]
    own_bytes: int
    owned: bool


@dataclasses.dataclass(frozen=True, repr=False)
class Coverage:
    """The result of ``jp.function(fn).coverage(params, x)``, which prints as a table.

    Attributes:
        examples: the number of examples in the batch.
        params: an entry for each param.
    """

    examples: int
    params: tuple[Covered, ...]

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        own = sum(each.own_bytes for each in self.params if each.owned)
        factored = sum(bool(each.meets) for each in self.params)
        yield (
            f"{len(self.params)} params, {factored} in factors; gradients formed per example: "
            f"{_size(own)} for {self.examples} examples"
        )
        for each in self.params:
            size = f" {_size(each.own_bytes)}" if each.owned else ""
            shape = "×".join(map(str, each.shape)) or "scalar"
            facts = f"{shape}  {each.form}{size}"
            gap = WIDTH - len(each.param) - len(facts)
            yield f"{each.param}{' ' * gap}{facts}" if gap > 1 else f"{each.param}\n    {facts}"
            for primitive, line, scope in dict.fromkeys(each.meets):
                where = f" in {scope}" if scope else ""
                yield from textwrap.wrap(
                    f"{primitive} at {line}{where}",
                    WIDTH,
                    initial_indent="    ",
                    subsequent_indent="        ",
                    break_on_hyphens=False,
                )


def coverage_of(one: Example, params: Params, examples: int) -> Coverage:
    """Return the coverage of a traced function, for the given number of examples."""
    return Coverage(examples, tuple(_covered(one, params, examples)))


def warn_of_large_shares(name: str, one: Example, params: Params, examples: int) -> None:
    """Warn, once for each, of params with several axes whose per-example gradients are large.

    Args:
        name: the function's name, for messages.
        one: the traced function.
        params: its params.
        examples: the number of examples.
    """
    if not isinstance(examples, int):  # a symbol, in jax.export
        return
    for each in _covered(one, params, examples):
        if each.owned and len(each.shape) > 1 and each.own_bytes > LARGE:
            _warn(
                f"{name}: {each.param} meets no data in a matrix product, a convolution or a "
                f"look-up of rows, so its gradient is formed for each example: "
                f"{_size(each.own_bytes)} for {examples} examples"
            )


@functools.lru_cache(maxsize=1024)
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _covered(one: Example, params: Params, examples: int) -> Iterator[Covered]:
    nodes = jax.tree.leaves_with_path(params, is_leaf=is_not_learned)
    uses: dict[int, list[Use]] = {}
    for use in one.whole.uses:
        for part in use.parts:
            uses.setdefault(part.param, []).append(use)
    for index, (path, _) in enumerate(nodes):
        leaf, here = one.params[index], uses.get(index, [])
        owned = index in one.whole.owned
        forms = [*dict.fromkeys(map(_form, here)), *["per example"] * owned]
        word = "unused" if index in one.learned else "not learned"
        yield Covered(
            jax.tree_util.keystr(path, simple=True, separator="/") or "params",
            tuple(leaf.shape),
            " + ".join(forms) or word,
            tuple((use.primitive, use.line, use.scope) for use in here),
            examples * math.prod(leaf.shape) * jnp.result_type(leaf).itemsize,
            owned,
        )


def _form(use: Use) -> str:
    form = FORMS[type(use.meeting)]
    layers = sum(use.scans)
    if isinstance(use.meeting, MatrixProduct):
        layers += bool(use.meeting.dot.batched[1])
    return "Repeated(" * layers + form + ")" * layers


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
