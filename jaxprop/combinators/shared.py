"""Parameters that are used more than once."""

from __future__ import annotations

from typing import Any

import chex
import jax
from jax import Array
from jaxtyping import Float, Int

from jaxprop.combinators.repeat import Repeat
from jaxprop.combinators.wrapper import Wrapper
from jaxprop.factored import Outer, is_factored, joint
from jaxprop.layer import Combinator, Layer, Leave, Step, inner_layers
from jaxprop.seats import bare
from jaxprop.shapes import check_count, require, shapes


class Shared(Wrapper):
    """y = f(f(... f(x))), the same params each time.

    dE/dparams is the sum over the uses of what each pulls back. An example's share is that sum too,
    so its square has cross terms: the forms of the uses are joined before anything is asked of
    them. To the walk it is one layer.
    """

    times: int

    def __post_init__(self) -> None:
        require(self.layer, Layer, "shared")
        check_count("shared: times", self.times)
        if _holds_a_repeat(self.layer):
            raise ValueError("shared: a repeat inside is not supported; share the repeated layer")

    def __repr__(self) -> str:
        return f"shared({self.layer!r}, {self.times})"

    def forward(self, params: Any, x: Any) -> tuple[Any, tuple[Any, ...]]:
        residuals = []
        for _ in range(self.times):
            x, r = self.layer.forward(params, x)
            residuals.append(r)
        return x, tuple(residuals)

    def inside(self, residuals: Any) -> tuple[Layer, Any]:
        if self.layer.batch_coupled:
            raise ValueError(
                f"{self}: each use has statistics of its own, and there is one place for them"
            )
        return self.layer, residuals[0]

    def backward(self, params: Any, residuals: tuple[Any, ...], ct: Any) -> tuple[Any, Any]:
        uses = []
        for r in reversed(residuals):
            d_params, ct = self.layer.backward(params, r, ct)
            uses.append(d_params)

        def together(*leaves: Any) -> Any:
            return joint(leaves) if is_factored(leaves[0]) else sum(leaves[1:], start=leaves[0])

        return jax.tree.map(together, *uses, is_leaf=is_factored), ct


class Tied(Combinator):
    """y = h W^T with h = body(W[x]): the table that reads the tokens also scores them.

    With ct the cotangent of y and e that of the rows W[x],

        dE/dW = sum_t ct_t (outer) h_t + sum_t [row x_t] e_t,   dE/dh = ct W

    (Press and Wolf 2017, https://arxiv.org/abs/1608.05859). Both uses belong to one example's share
    of W, and are joined before they are squared. params are (table, the body's params).
    """

    embedding: Layer
    body: Layer

    def __post_init__(self) -> None:
        require(self.embedding, Layer, "tied: the embedding")
        require(self.body, Layer, "tied: the body")

    def __repr__(self) -> str:
        return f"tied({self.embedding!r}, {self.body!r})"

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[Any, Any]:
        table = self.embedding.init(key, x)
        rows, _ = jax.eval_shape(self.embedding.forward, table, x)
        return table, self.body.init(jax.random.fold_in(key, 1), rows)

    def check_params(self, params: Any, x: Any) -> None:
        """Only the pair: embedding and body hold their own params to their own ``init``."""
        if type(params) is not tuple or len(params) != 2:
            raise ValueError(
                f"{self} takes the params (table, the body's params), not {shapes(params)}"
            )

    def forward(self, params: Any, x: Int[Array, "n ..."]) -> tuple[Float[Array, "n ... v"], Any]:
        table, of_body = params
        rows, of_rows = self.embedding.forward(table, x)
        h, residuals = self.body.forward(of_body, rows)
        if h.shape[-1] != table.shape[-1]:
            raise ValueError(
                f"{self}: the body gives {shapes(h)}, but the table {shapes(table)} scores "
                f"{table.shape[-1]} features"
            )
        return h @ table.astype(h.dtype).T, (of_rows, residuals, h)

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        seat, of_body = params
        table, (of_rows, residuals, h) = bare(seat), residuals
        left, ct_rows = self.body.walk(of_body, residuals, ct @ table.astype(h.dtype), leave)
        d_table, d_x = self.embedding.backward(table, of_rows, ct_rows)
        if not is_factored(d_table):
            raise TypeError(
                f"{self}: the embedding's cotangent of its table must be a form, such as jp.Rows, "
                "so that the table's two uses can be joined; it is a plain array"
            )
        both = joint((d_table, Outer(ct, h)))
        return (leave(Step.at(self.embedding, seat, of_rows, ct, both, d_x)), left), d_x

    def given(self, params: Any, *, key: chex.PRNGKey | None = None, mask: Any = None) -> Any:
        table, of_body = params
        return table, self.body.given(of_body, key=key, mask=mask)


def shared(layer: Layer, times: int) -> Shared:
    """The layer ``times`` times over with the same params, which are the layer's own.

    Every quantity counts a param's uses as one: ``|g_1 + g_2|^2`` is not ``|g_1|^2 + |g_2|^2``.
    What is given is shared too: a Dropout inside drops the same entries each time.
    """
    return Shared(layer, times)


def tied(embedding: Layer, body: Layer) -> Tied:
    """embedding, body, and then the scores h W^T by the embedding's own table W.

    x is (N, ...) integers and y (N, ..., vocab). params are (table, the body's params). The body
    ends in as many features as the table has; others raise ``ValueError``.

    Example:
        >>> import jaxprop as jp
        >>> jp.tied(jp.Embedding(50, 8), jp.chain(jp.Dense(8), jp.Tanh()))
        tied(Embedding(50, 8), chain(Dense(8), Tanh()))
    """
    return Tied(embedding, body)


def _holds_a_repeat(layer: Layer) -> bool:
    return isinstance(layer, Repeat) or any(map(_holds_a_repeat, inner_layers(layer)))
