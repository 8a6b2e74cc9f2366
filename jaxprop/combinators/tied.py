"""An embedding whose table also scores the output."""

from __future__ import annotations

import jax
from jax import Array
from jaxtyping import Float, Int

from jaxprop.core.checks import require
from jaxprop.core.combinator import Combinator
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Outer, is_factored, joint
from jaxprop.core.layer import Layer
from jaxprop.core.step import Step, Visit, params_of
from jaxprop.core.tree import arrays, learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Tied(Combinator):
    """y = h W^T with h = body(W[x]): the table that reads the tokens also scores them.

    With ct the cotangent of y and e the cotangent of the rows W[x],

        dE/dW = sum_t ct_t (outer) h_t + sum_t [row x_t] e_t,   dE/dh = ct W

    (Press and Wolf 2017, https://arxiv.org/abs/1608.05859). Both uses belong to one example's share
    of W, and are joined before they are squared. params are (table, the body's params).

    Attributes:
        embedding: the layer whose params are the table W.
        body: the layer between the embedding and the scores.
    """

    embedding: Layer
    body: Layer

    def __post_init__(self) -> None:
        require(self.embedding, Layer, "tied: the embedding")
        require(self.body, Layer, "tied: the body")

    def __repr__(self) -> str:
        return f"tied({self.embedding!r}, {self.body!r})"

    def init(self, key: Array, x: PyTree) -> Params:
        return self.init_with_output(key, x)[0]

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        table, rows = self.embedding.init_with_output(key, x)
        self._check_table(table)
        of_body, h = self.body.init_with_output(jax.random.fold_in(key, 1), rows)
        return (table, of_body), jax.eval_shape(self._scores, table, h)

    def check_places(self, params: Params) -> None:
        """Raise ``ValueError`` unless params are a pair."""
        if type(params) is not tuple or len(params) != 2:
            raise ValueError(
                f"{self} takes the params (table, the body's params), not {shapes(params)}"
            )

    def forward(
        self, params: Params, x: Int[Array, "n ..."]
    ) -> tuple[Float[Array, "n ... v"], Residuals]:
        table, of_body = params
        self._check_table(table)
        rows, of_rows = self.embedding.forward(table, x)
        h, residuals = self.body.forward(of_body, rows)
        return self._scores(table, h), (of_rows, residuals, h)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        of_table, of_body = place
        params, (of_rows, residuals, h) = params_of(of_table, visit), residuals
        ct_h = ct @ arrays(params).astype(h.dtype)
        visited, ct_rows = self.body.walk(of_body, residuals, ct_h, visit)
        d_table, d_x = self.embedding.backward(params, of_rows, ct_rows)
        both = ()
        if jax.tree.leaves(learned(params)):
            both = self._joined(d_table, ct, h)
        step = Step.of(self.embedding, params, of_rows, ct, both, d_x, of_table)
        return (visit(step), visited), d_x

    def _check_table(self, params: Params) -> None:
        table = arrays(params)
        if not hasattr(table, "shape") or len(table.shape) != 2:
            raise ValueError(
                f"{self}: the params of {self.embedding} are {shapes(params)}, but the first layer "
                "of tied is one whose params are the table (vocab, features) alone, such as "
                "jp.Embedding; what comes after the rows goes into the body"
            )

    def _joined(self, d_table: Cotangent, ct: Cotangent, h: Array) -> Cotangent:
        """Return the joint form of the table's two uses."""
        if not is_factored(d_table):
            raise TypeError(
                f"{self}: the embedding's cotangent of its table must be a form, such as "
                "jp.forms.Rows, so that the table's two uses can be joined; it is a plain array"
            )
        return joint((d_table, Outer(ct, h)))

    def _scores(self, params: Params, h: Float[Array, "n ... d"]) -> Float[Array, "n ... v"]:
        table = arrays(params)
        if h.shape[-1] != table.shape[-1]:
            raise ValueError(
                f"{self}: the body gives {shapes(h)}, but the table {shapes(table)} scores "
                f"{table.shape[-1]} features"
            )
        return h @ table.astype(h.dtype).T


def tied(embedding: Layer, body: Layer) -> Tied:
    """Return embedding, body and the scores h W^T, by the embedding's own table W, as one layer.

    x is (N, ...) integers and y (N, ..., vocab). params are (table, the body's params).

    Args:
        embedding: a layer whose params are a table (vocab, features), such as ``jp.Embedding``.
        body: a layer whose output has as many features as the table; others raise ``ValueError``.

    Raises:
        TypeError: for an argument that is not a layer.
        ValueError: in ``init`` and ``forward``, for an embedding whose params are anything else.

    Example:
        >>> import jaxprop as jp
        >>> jp.tied(jp.Embedding(50, 8), jp.chain(jp.Dense(8), jp.Tanh()))
        tied(Embedding(50, 8), chain(Dense(8), Tanh()))
    """
    return Tied(embedding, body)
