"""The sum of losses on the parts of an output that is a dict or a tuple."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.checks import require
from jaxprop.core.describe import shapes
from jaxprop.core.loss import Loss
from jaxprop.core.types import Cotangent, PyTree, Residuals
from jaxprop.losses.arguments import check_plain_number

Weighted: TypeAlias = Loss | tuple[float, Loss]


class Part(NamedTuple):
    """The loss on one part of the output.

    Attributes:
        name: the part's key, or index.
        weight: the factor of the loss.
        loss: the loss.
    """

    name: str | int
    weight: float
    loss: Loss


class TotalLoss(Loss):
    """A weighted sum of losses, E = sum_i a_i E_i(y_i, t_i), so dE/dy_i = a_i dE_i/dy_i.

    The Hessian is block diagonal. Its root has the columns of all parts one after the other, each
    sqrt(a_i) times the part's column, and zero elsewhere. ``sample`` samples each part separately.

    Attributes:
        parts: the parts.
    """

    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        shown = []
        for name, weight, loss in self.parts:
            weighted = repr(loss) if weight == 1 else f"({weight!r}, {loss!r})"
            shown.append(weighted if isinstance(name, int) else f"{name}={weighted}")
        return f"total_loss({', '.join(shown)})"

    def forward(
        self, y: PyTree, target: PyTree
    ) -> tuple[Float[Array, " n"], tuple[Residuals, ...]]:
        self._check(y, target)
        each, residuals = [], []
        of_parts: Any = dict(enumerate(target)) if isinstance(target, tuple) else target or {}
        for name, weight, loss in self.parts:
            given = of_parts.get(name)
            try:
                values, r = loss.forward(y[name], given)
            except Exception as error:
                if given is None:
                    error.add_note(f"the target has no part {name!r}")
                raise
            each.append(_scaled(weight, values))
            residuals.append(r)
        return sum(each[1:], start=each[0]), tuple(residuals)

    def backward(self, residuals: tuple[Residuals, ...]) -> Cotangent:
        cts = [part.loss.backward(r) for part, r in zip(self.parts, residuals, strict=True)]
        return self._output([_scaled(p.weight, ct) for p, ct in zip(self.parts, cts, strict=True)])

    def real(self, residuals: tuple[Residuals, ...]) -> Bool[Array, "n ..."] | None:
        """Return False where all parts say that an example, or a position, is padding.

        None if one of them has no padding, or if their positions differ.
        """
        each = [part.loss.real(r) for part, r in zip(self.parts, residuals, strict=True)]
        known = [real for real in each if real is not None]
        if len(known) < len(each) or len({real.shape for real in known}) > 1:
            return None
        return functools.reduce(jnp.logical_or, known)

    def hessian_columns(self, residuals: tuple[Residuals, ...]) -> int:
        pairs = zip(self.parts, residuals, strict=True)
        return sum(part.loss.hessian_columns(r) for part, r in pairs)

    def hessian_column(self, residuals: tuple[Residuals, ...], c: int | Array) -> Cotangent:
        columns = []
        for (_, weight, loss), r in zip(self.parts, residuals, strict=True):
            number = loss.hessian_columns(r)
            column = loss.hessian_column(r, jnp.clip(c, 0, number - 1))
            here = (c >= 0) & (c < number)
            columns.append(
                jax.tree.map(
                    lambda leaf, here=here: jnp.where(here, leaf, 0),
                    _scaled(math.sqrt(weight), column),
                )
            )
            c = c - number
        return self._output(columns)

    def sample(self, key: Array, residuals: tuple[Residuals, ...]) -> Cotangent:
        drawn = []
        for index, ((_, weight, loss), r) in enumerate(zip(self.parts, residuals, strict=True)):
            sample = loss.sample(jax.random.fold_in(key, index), r)
            drawn.append(_scaled(math.sqrt(weight), sample))
        return self._output(drawn)

    def _output(self, parts: list[PyTree]) -> PyTree:
        """Return a tree like y, from a list with an entry for each part."""
        if isinstance(self.parts[0].name, int):
            return tuple(parts)
        return {part.name: leaf for part, leaf in zip(self.parts, parts, strict=True)}

    def _check(self, y: PyTree, target: PyTree) -> None:
        """Raise ``ValueError`` unless y has these parts, and the target no others."""
        names = {part.name for part in self.parts}
        if isinstance(self.parts[0].name, int):
            fits = type(y) is tuple and len(y) == len(names)
            known = target is None or (type(target) is tuple and len(target) == len(names))
            kind = f"a tuple of {len(names)}"
        else:
            fits = type(y) is dict and set(y) == names
            known = target is None or (type(target) is dict and set(target) <= names)
            kind = f"a dict of {', '.join(map(str, sorted(names, key=str)))}"
        for what, right, tree in (("output", fits, y), ("target", known, target)):
            if not right:
                raise ValueError(f"{self}: the {what} is {shapes(tree)}, not {kind}")


def total_loss(*parts: Weighted, **named: Weighted) -> TotalLoss:
    """Return the weighted sum of a loss on each part of an output that is a tuple or a dict.

    Every part of the output needs a loss. The target has the same parts; for a loss that takes no
    target, the part is None, or left out of the dict.

    Args:
        parts: for an output that is a tuple: a loss, or a pair (weight, loss), for each part. The
            weight is a plain number, not negative.
        named: for an output that is a dict, the same by key.

    Raises:
        TypeError: for a part that is not a loss, or a weight that is not a number.
        ValueError: for no losses, or some by name and some not; in ``forward``, for an output or a
            target with other parts.

    Example:
        >>> import jaxprop as jp
        >>> jp.total_loss(digit=jp.CrossEntropy(), angle=(0.1, jp.HalfSquaredError()))
        total_loss(digit=CrossEntropy(), angle=(0.1, HalfSquaredError()))
    """
    if bool(parts) == bool(named):
        raise ValueError("total_loss takes a loss for each part: all by name, or none")
    return TotalLoss(tuple(_part(*each) for each in named.items() or enumerate(parts)))


def _part(name: str | int, weighted: Weighted) -> Part:
    where = f"total_loss: {name}"
    is_pair = type(weighted) is tuple and len(weighted) == 2
    weight, loss = cast(Any, weighted if is_pair else (1.0, weighted))
    check_plain_number(f"{where}: the weight", weight)
    require(loss, Loss, where)
    return Part(name, float(weight), loss)


def _scaled(weight: float, tree: PyTree) -> PyTree:
    """Return the tree times a weight; zeros for a weight of 0, whatever the tree holds."""
    if weight == 0:
        return jax.tree.map(jnp.zeros_like, tree)
    return tree if weight == 1 else jax.tree.map(lambda leaf: weight * leaf, tree)
