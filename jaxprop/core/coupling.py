"""Detection, by trial, of layers that couple the examples of a batch and do not declare it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.core.child import layers_within
from jaxprop.core.combinator import Combinator, Wrapper, map_children
from jaxprop.core.layer import Layer
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.tree import SideInput, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals

LIBRARY = __name__.partition(".")[0]
LARGEST = 10**6  # a layer is not tried with more numbers in its params and two examples
RTOL = 1e-3  # an iteration that stops by its worst example changes the others by less than this


def check_uncoupled(net: Layer, params: Params, x: PyTree) -> None:
    """Raise ``ValueError`` for a layer that couples the examples of a batch.

    Of the layers that declare it, only a combinator whose inner layers do not couple examples is
    refused here; the others raise on the walk back. A layer from outside this library is tried
    while tracing, once for its shapes: on two examples of random numbers, where a change of one
    must not reach the other's y. That is a help and no proof. A layer is tried without side inputs,
    and not at all with more than a million numbers, in ``jax.shard_map``, or if it calls back to
    Python (as ``jax.debug.print`` does).

    Args:
        net: the network.
        params: its params, side inputs included.
        x: the inputs.
    """
    _check_combinators(net)
    if (
        any(map(_is_other, layers_within(net)))
        and not (net.batch_coupled or shard_map_axes())
        and _is_hashable(net)
    ):
        leaves, structure = jax.tree.flatten((params, x))
        _try_all(net, structure, tuple(map(_struct, leaves)))


def couples(layer: Layer, params: Params, x: PyTree) -> bool:
    """Return whether, in a trial on two examples, one example's y depends on the other example.

    Args:
        layer: the layer.
        params: its params, as arrays or their structs.
        x: the input, as arrays or their structs.
    """
    bare = jax.tree.map(
        lambda node: () if isinstance(node, SideInput) else node, params, is_leaf=is_not_learned
    )
    of_two = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), x)
    leaves, structure = jax.tree.flatten((bare, of_two))
    return _couples(layer, structure, tuple(map(_struct, leaves)))


def coupled(layer: Layer) -> str:
    """Return the message for a layer that couples the examples of a batch."""
    return (
        f"{layer}: an example's y depends on the other examples of the batch; a layer that couples "
        "them says so, by batch_coupled = True in its class"
    )


class Tried(Wrapper):
    """y = f(x), after a trial that f does not couple examples."""

    def __repr__(self) -> str:
        return repr(self.layer)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        if couples(self.layer, params, x):
            raise ValueError(coupled(self.layer))
        return self.layer.forward(params, x)

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        return self.layer.backward(params, residuals, ct)


def _check_combinators(layer: Layer) -> None:
    inner = [child.layer for child in layer.children()]
    if isinstance(layer, Combinator) and layer.batch_coupled:
        if not any(each.batch_coupled for each in inner):
            raise ValueError(
                f"{layer} couples the examples of a batch: an example has no gradient of its own"
            )
        for each in inner:
            _check_combinators(each)


def _is_other(layer: Layer) -> bool:
    return type(layer).__module__.partition(".")[0] != LIBRARY


def _is_hashable(layer: Layer) -> bool:
    try:
        hash(layer)
    except TypeError:  # the forward pass reports the field
        return False
    return True


def _tried(layer: Layer) -> Layer:
    return Tried(layer) if _is_other(layer) else map_children(layer, _tried)


@functools.lru_cache(maxsize=1024)
def _try_all(net: Layer, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    jax.eval_shape(_tried(net).forward, *jax.tree.unflatten(structure, leaves))


@functools.lru_cache(maxsize=1024)
def _couples(layer: Layer, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    if not all(map(_is_plain, leaves)):
        return False
    if sum(leaf.size for leaf in leaves) > LARGEST:
        return False
    params, x = jax.tree.unflatten(structure, leaves)
    draw = functools.partial(_drawn, np.random.default_rng(0))
    params, x, other = jax.tree.map(draw, (params, x, x))

    def y(params: Params, x: PyTree) -> PyTree:
        return layer.forward(params, x)[0]

    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            traced = jax.jit(y).trace(params, x)
            if traced.jaxpr.effects:
                return False
            forward = traced.lower().compile()
            before, *after = (
                jax.tree.leaves(forward(params, each))
                for each in (x, _with(x, other, 0), _with(x, other, 1))
            )
    except Exception:  # a faulty layer raises where it is used
        return False
    return any(map(_moved, before, *after))


def _is_plain(leaf: jax.ShapeDtypeStruct) -> bool:
    """Return whether a leaf holds numbers and has a known shape."""
    known = all(isinstance(size, int) for size in leaf.shape)
    return known and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _with(x: PyTree, other: PyTree, n: int) -> PyTree:
    """Return x with its n-th example taken from ``other``."""
    keep = np.arange(2) != n
    return jax.tree.map(lambda a, b: np.where(keep.reshape(2, *[1] * (a.ndim - 1)), a, b), x, other)


def _moved(y: Array, *after: Array) -> bool:
    """Return whether an example of y changed when the other example of x did."""
    kept = [(np.asarray(y)[1 - n], np.asarray(new)[1 - n]) for n, new in enumerate(after)]
    return any(
        bool(np.any(np.abs(a - b) > RTOL * np.max(np.abs(a), initial=0)))
        for a, b in kept
        if np.isfinite(a).all() and np.isfinite(b).all()
    )


def _drawn(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Return random numbers, positive ones for floats, in at least float32."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        dtype = leaf.dtype if leaf.dtype.itemsize >= 4 else np.float32
        return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
    return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
