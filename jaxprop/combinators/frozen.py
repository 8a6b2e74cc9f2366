"""Layers whose params are not learned."""

from __future__ import annotations

import jax
from jax import Array

from jaxprop.core.combinator import Combinator, Wrapper
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.tree import freeze, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Frozen(Wrapper, Combinator):
    """y = f(x), with every array of f's params ``Unlearned``: only ct is pulled back.

    Attributes:
        layer: f.
    """

    def __repr__(self) -> str:
        return f"frozen({self.layer!r})"

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params, y = self.layer.init_with_output(key, x)
        return freeze(params), y

    def init(self, key: Array, x: PyTree) -> Params:
        return freeze(self.layer.init(key, x))

    def check_params(self, params: Params, x: PyTree) -> None:
        """Raise ``ValueError`` for params that are not frozen."""
        if not all(map(is_not_learned, jax.tree.leaves(params, is_leaf=is_not_learned))):
            raise ValueError(
                f"{self}: params hold arrays that are learned; mark them by jp.freeze(params)"
            )

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        return self.layer.forward(params, x)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        return self.layer.walk(place, residuals, ct, visit)


def frozen(layer: Layer) -> Frozen:
    """Return the layer with params that training leaves alone.

    Its ``init`` marks every array as ``jp.Unlearned``. No gradient is computed for these arrays;
    they count in no norm, and get no noise, no update and no optimizer state. Mark params that were
    made or loaded elsewhere with ``jp.freeze(params)``, which does the same for a net without
    ``frozen``. A BatchNorm inside still normalizes by the batch, and ``jp.update_batch_stats``
    still moves its running statistics; to prevent this, freeze ``jp.inference_mode(layer)``.

    Args:
        layer: a layer, or a whole net.

    Raises:
        TypeError: for an argument that is not a layer.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.chain(jp.frozen(jp.Dense(8)), jp.Relu(), jp.Dense(3))
        >>> params = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> type(params[0].w).__name__, params[2].w.shape
        ('Unlearned', (8, 3))
    """
    return Frozen(layer)
