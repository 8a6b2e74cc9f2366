"""Where params and optimizer state lie on a mesh. JAX's own ``jit`` does the rest.

Each rule gives a tree of ``NamedSharding`` like the tree it is asked about, for ``jax.device_put``
or for ``in_shardings`` and ``out_shardings``. It looks at shapes alone: params, gradients, any
optax state, and the ``ShapeDtypeStruct`` of them will do.

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    NamedSharding(mesh, PartitionSpec("data"))          # x and target, under every rule
    NamedSharding(mesh, PartitionSpec())                # data parallel: params on all devices
    jp.sharding.fully_sharded(params, mesh, "data")     # FSDP, for the net gathered(net, mesh)
    jp.sharding.tensor_parallel(params, mesh, "model")

On meshes of Explicit axes (the default of newer JAX) losses, gradients and updates work with the
batch split and params whole; the rules here (which raise ``ValueError`` for others) and the
quantities are for Auto axes.

Every quantity is right under each of them. Those that take one example after the other (squared
norms and second moments along positions, clipping) are quick under ``jax.shard_map`` alone, where
each device takes its own; under ``jit`` XLA sends all examples to all devices.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprop.core.checks import require
from jaxprop.core.combinator import Wrapper, map_layers
from jaxprop.core.layer import Layer
from jaxprop.layers import AffineParams


def fully_sharded(tree: Any, mesh: Mesh, *axes: str, smallest: int = 2**12) -> Any:
    """Each leaf split over the mesh, or its ``axes`` alone, on the largest axis that they divide.

    Params, gradients and optimizer state then take a device's share of memory each (ZeRO-3,
    Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054). Use it with ``gathered(net, mesh)``
    and the batch split over the same mesh axes.

    Several mesh axes go one after the other, on the same array axis if they can: a mesh of (64, 8)
    divides (1600, 6400), where one of 512 divides neither. Axis 0 is split only where no other can
    be: inside ``repeat`` it is the layers', and a scan takes its params from it one by one. A leaf
    is whole along a mesh axis that divides none of its own, and everywhere if it has fewer than
    ``smallest`` elements, whose gathering would take longer than their memory is worth.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> tuple(jp.sharding.fully_sharded(jnp.ones((12, 64, 256)), mesh, "data").spec)
        (None, None, 'data')
    """
    _check_tree(tree)
    sizes = _sizes(mesh, *axes) or dict(mesh.shape)

    def place(leaf: Any) -> NamedSharding:
        shape = jnp.shape(leaf)
        names: list[Any] = [None] * len(shape)
        if math.prod(shape) >= smallest:
            for among in range(1, len(names)), range(min(1, len(names))):
                if not any(names):
                    names = _split(shape, among, sizes)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(place, tree)


def tensor_parallel(tree: Any, mesh: Mesh, axis: str, *, vocab: int | None = None) -> Any:
    """Dense layers split over the mesh axis ``axis``: those that widen by columns, others by rows.

    Of a pair that widens and narrows, each device has a part of the features between, which nobody
    else needs; one all-reduce adds up what the rows make of them, and one the d_x of the columns
    (Megatron-LM, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). In GPT-2 the columns are
    ``attn.c_attn`` and ``mlp.c_fc``, the rows ``attn.c_proj`` and ``mlp.c_proj``. (The columns of
    ``c_attn``, q, k and v one after the other, do not fall on heads: XLA gathers its activations.)

    An array of ``vocab`` rows is a table, and split by them. All else is on every device, and so
    is what ``axis`` does not divide: pad a vocabulary of 50257 to 50304.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> down = jp.AffineParams(jnp.ones((256, 64)), jnp.ones(64))
        >>> tuple(jp.sharding.tensor_parallel(down, mesh, "model").w.spec)
        ('model', None)
    """
    _check_tree(tree)
    size = _sizes(mesh, axis)[axis]

    def is_dense(node: Any) -> bool:
        """Not so where an optimizer's state has something else in the place of w."""
        if not isinstance(node, AffineParams):
            return False
        w = jax.tree.leaves(node.w)
        return len(w) == 1 and getattr(w[0], "ndim", 0) >= 2

    def place(node: Any) -> Any:
        if not is_dense(node):
            table = vocab is not None and jnp.shape(node)[:1] == (vocab,)
            return split(node, 0 if table else None)
        (w,) = jax.tree.leaves(node.w)
        columns = w.shape[-1] > w.shape[-2]
        return AffineParams(
            jax.tree.map(lambda w: split(w, -1 if columns else -2), node.w),
            jax.tree.map(lambda b: split(b, -1 if columns else None), node.b),
        )

    def split(leaf: Any, on: int | None) -> NamedSharding:
        names: list[str | None] = [None] * jnp.ndim(leaf)
        if on is not None and leaf.shape[on] % size == 0:
            names[on] = axis
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(place, tree, is_leaf=is_dense)


class Gathered(Wrapper):
    """y = f(x), f's params gathered from all devices where they are used."""

    mesh: Mesh
    transparent: ClassVar[bool] = True

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        return self.layer.forward(self._gathered(params), x)

    def backward(self, params: Any, residuals: Any, ct: Any) -> tuple[Any, Any]:
        return self.layer.backward(self._gathered(params), residuals, ct)

    def _gathered(self, params: Any) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(params, everywhere)


def gathered(net: Layer, mesh: Mesh) -> Layer:
    """The same net for params that are split over the mesh: each layer gathers its own.

    Without it XLA may as well move the activations, and for ``fully_sharded`` params it does. With
    it a layer's params are whole where the layer uses them, forward and again on the way back, and
    nowhere else: inside ``repeat``, those of one block at a time. ``jp.cast(gathered(net, mesh),
    dtype)`` rounds them first. Raises ``ValueError`` for a mesh whose axes are not Auto, as those
    of ``jax.make_mesh`` are by default in newer JAX.
    """
    require(net, Layer, "gathered")
    _sizes(mesh)
    return map_layers(net, lambda layer: Gathered(layer, mesh))


def _split(shape: tuple[int, ...], among: range, sizes: dict[str, int]) -> list[Any]:
    """For each axis of shape the mesh axes that split it: one for all, or the longest for each."""
    left = list(shape)
    names: list[tuple[str, ...]] = [()] * len(shape)
    for name, size in sizes.items():
        fits = [axis for axis in among if left[axis] % size == 0]
        if fits:
            axis = max(fits, key=lambda axis: (bool(names[axis]), left[axis]))
            left[axis] //= size
            names[axis] = (*names[axis], name)
    return [each[0] if len(each) == 1 else each or None for each in names]


def _check_tree(tree: Any) -> None:
    if isinstance(tree, Layer):
        raise TypeError(f"params have a place, a net has none: got {tree}")


def _sizes(mesh: Mesh, *axes: str) -> dict[str, int]:
    require(mesh, Mesh, "the mesh")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"the mesh must be one of Auto axes, not {mesh.axis_types}: write "
            "jax.make_mesh(..., axis_types=(AxisType.Auto,) * n)"
        )
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"the mesh has the axes {mesh.axis_names}, and no {name!r}")
    return {name: mesh.shape[name] for name in axes}
