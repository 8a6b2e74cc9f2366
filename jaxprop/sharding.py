"""Shardings of params and optimizer state over a mesh of devices; ``jax.jit`` does the rest.

Each rule takes a tree and returns a tree of ``NamedSharding`` like it, for ``jax.device_put`` or
for ``in_shardings`` and ``out_shardings``. A rule looks only at shapes, so that the tree may be
params, gradients, any optax state, or the ``jax.ShapeDtypeStruct`` of these.

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    NamedSharding(mesh, PartitionSpec("data"))          # x and target, under every rule
    NamedSharding(mesh, PartitionSpec())                # data parallel: params on all devices
    jp.sharding.fully_sharded(params, mesh, "data")     # FSDP, for the net gathered(net, mesh)
    jp.sharding.tensor_parallel(params, mesh, "model")

The rules are for meshes of Auto axes; for others they raise ``ValueError``. On meshes of Explicit
axes (the default of newer JAX) losses, gradients, updates and quantities work with the batch split
and params replicated; per-example results are then split like the batch. A visit of your own that
asks a form for more than its sum must wrap that in ``jax.sharding.auto_axes``.

Every quantity is correct under every rule. Squared norms and second moments along positions, and
clipping, process the examples one after the other. They are fast only under ``jax.shard_map``,
where each device has its own examples: under ``jax.jit`` XLA sends all examples to all devices.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprop.core.checks import check_count, require
from jaxprop.core.combinator import Wrapper, map_layers
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.layers import AffineParams

_Axes = list[str | tuple[str, ...] | None]
"""The mesh axes that split each axis of an array, as ``PartitionSpec`` takes them."""


def fully_sharded(tree: PyTree, mesh: Mesh, *axes: str, smallest: int = 2**12) -> PyTree:
    """Return shardings that split each leaf over the mesh, on the largest axis that allows it.

    Each device then holds its share of params, gradients and optimizer state (ZeRO-3, Rajbhandari
    et al. 2020, https://arxiv.org/abs/1910.02054). Use it with ``gathered(net, mesh)``, and with
    the batch split over the same mesh axes.

    The mesh axes are placed one after the other, on the same axis of the leaf if they divide it. A
    mesh of (64, 8) splits the last two axes of a leaf (48, 1600, 6400), of which a mesh of 512
    divides none. A leaf is not split over a mesh axis that divides none of its own axes. Axis 0 is
    split only if no other axis can be: in a ``repeat`` it is the axis of layers, from which a scan
    takes params one by one.

    Args:
        tree: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: a mesh of Auto axes.
        axes: the names of the mesh axes to split over; all of them by default.
        smallest: the number of elements below which a leaf is replicated, because gathering it
            would cost more time than its memory is worth.

    Returns:
        A tree of ``NamedSharding`` like ``tree``.

    Raises:
        TypeError: for a net in place of its params, or for a mesh that is not one.
        ValueError: for a mesh whose axes are not Auto, or an axis that it does not have.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> tuple(jp.sharding.fully_sharded(jnp.ones((12, 64, 256)), mesh, "data").spec)
        (None, None, 'data')
    """
    _check_tree(tree)
    check_count("smallest", smallest, least=0)
    sizes = _sizes(mesh, *axes) or dict(mesh.shape)

    def place(leaf: Array) -> NamedSharding:
        shape = jnp.shape(leaf)
        names: _Axes = [None] * len(shape)
        if math.prod(shape) >= smallest:
            for among in range(1, len(names)), range(min(1, len(names))):
                if not any(names):
                    names = _split(shape, among, sizes)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(place, tree)


def tensor_parallel(tree: PyTree, mesh: Mesh, axis: str, *, vocab: int | None = None) -> PyTree:
    """Return shardings that split dense layers by columns if they widen, else by rows.

    In a pair of layers that widens and then narrows, each device computes its own part of the
    features in between. One all-reduce sums the outputs of the layer split by rows, and another the
    d_x of the layer split by columns (Megatron-LM, Shoeybi et al. 2019,
    https://arxiv.org/abs/1909.08053). In GPT-2, ``attn.c_attn`` and ``mlp.c_fc`` are split by
    columns, ``attn.c_proj`` and ``mlp.c_proj`` by rows. The columns of ``c_attn`` are q, k and v
    one after the other, so a split does not fall between heads, and XLA gathers its activations.

    All other arrays are replicated, and so are those that the mesh axis does not divide: pad a
    vocabulary of 50257 to 50304.

    Args:
        tree: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: a mesh of Auto axes.
        axis: the name of the mesh axis to split over.
        vocab: the number of rows of an embedding's table; an array with that many is split by rows.

    Returns:
        A tree of ``NamedSharding`` like ``tree``.

    Raises:
        TypeError: for a net in place of its params, or for a mesh that is not one.
        ValueError: for a mesh whose axes are not Auto, or an axis that it does not have.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> down = jp.AffineParams(jnp.ones((256, 64)), jnp.ones(64))
        >>> tuple(jp.sharding.tensor_parallel(down, mesh, "model").w.spec)
        ('model', None)
    """
    _check_tree(tree)
    if vocab is not None:
        check_count("vocab", vocab)
    size = _sizes(mesh, axis)[axis]

    def is_dense(node: object) -> bool:
        """Return whether a node has a matrix for w; in some optimizer states it does not."""
        if not isinstance(node, AffineParams):
            return False
        w = jax.tree.leaves(node.w)
        return len(w) == 1 and getattr(w[0], "ndim", 0) >= 2

    def place(node: PyTree) -> PyTree:
        if not is_dense(node):
            table = vocab is not None and jnp.shape(node)[:1] == (vocab,)
            return split(node, 0 if table else None)
        (w,) = jax.tree.leaves(node.w)
        columns = w.shape[-1] > w.shape[-2]
        return AffineParams(
            jax.tree.map(lambda w: split(w, -1 if columns else -2), node.w),
            jax.tree.map(lambda b: split(b, -1 if columns else None), node.b),
        )

    def split(leaf: Array, on: int | None) -> NamedSharding:
        names: _Axes = [None] * jnp.ndim(leaf)
        if on is not None and leaf.shape[on] % size == 0:
            names[on] = axis
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(place, tree, is_leaf=is_dense)


class Gathered(Wrapper):
    """A layer y = f(x) that gathers f's params from all devices where f uses them.

    Attributes:
        layer: f.
        mesh: the mesh that the params are split over.
    """

    mesh: Mesh
    transparent: ClassVar[bool] = True

    @property
    def by_module(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layer.by_module

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        return self.layer.forward(self.gathered(params), x)

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        return self.layer.backward(self.gathered(params), residuals, ct)

    def gathered(self, params: Params) -> Params:
        """Return params as the layer uses them, whole on each device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(params, everywhere)


def gathered(net: Layer, mesh: Mesh) -> Layer:
    """Return the same net, in which each layer gathers its params from the devices.

    A layer's params are whole while the layer uses them, in the forward pass and again on the walk
    back; in a ``repeat``, only those of one block at a time. Without ``gathered``, XLA is free to
    move the activations instead, and for ``fully_sharded`` params it does.
    ``jp.cast(gathered(net, mesh), dtype)`` rounds the params before it gathers them.

    Args:
        net: the network, with params split over the mesh.
        mesh: a mesh of Auto axes.

    Raises:
        TypeError: if net is not a layer, or mesh is not a mesh.
        ValueError: for a mesh whose axes are not Auto; newer JAX makes Explicit ones by default.
    """
    require(net, Layer, "gathered")
    _sizes(mesh)
    return map_layers(net, lambda layer: Gathered(layer, mesh))


def _split(shape: tuple[int, ...], among: range, sizes: dict[str, int]) -> _Axes:
    """Return the mesh axes that split each axis of shape; several share one if its size allows."""
    left = list(shape)
    names: list[tuple[str, ...]] = [()] * len(shape)
    for name, size in sizes.items():
        fits = [axis for axis in among if left[axis] % size == 0]
        if fits:
            axis = max(fits, key=lambda axis: (bool(names[axis]), left[axis]))
            left[axis] //= size
            names[axis] = (*names[axis], name)
    return [each[0] if len(each) == 1 else each or None for each in names]


def _check_tree(tree: PyTree) -> None:
    if isinstance(tree, Layer):
        raise TypeError(f"params have a place, a net has none: got {tree}")


def _sizes(mesh: Mesh, *axes: str) -> dict[str, int]:
    """Return the sizes of these mesh axes, after checking the mesh."""
    require(mesh, Mesh, "the mesh")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"the mesh must be one of Auto axes, not {mesh.axis_types}: write "
            "jax.make_mesh(..., axis_types=(AxisType.Auto,) * n)"
        )
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has the axes {mesh.axis_names}, and no {name!r}")
    return {name: mesh.shape[name] for name in axes}
