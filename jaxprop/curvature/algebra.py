"""Linear algebra with Kronecker factors, on trees like params: ``jp.curvature``.

A block a (outer) b of a curvature matrix F acts on a param G (I, O) as a G b. With a = U A U^T and
b = V B V^T, the block's eigenvectors are the products of those of a and b, so that any function of
F + damping is elementwise in their basis: U (f(A B^T) * (U^T G V)) V^T. No function here
materializes a block.

A curvature is a tree like params with a block at each leaf: a ``Kronecker`` from
``jp.kronecker_factors``, an ``Eigen`` from ``eigh`` or ``ekfac_factors``, an array like the param
for a diagonal, or ``()`` for no block, which counts as 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import added, scalar_of, wide
from jaxprop.core.checks import check_number, given
from jaxprop.core.describe import is_array, shapes
from jaxprop.core.forms import (
    Factored,
    InBlockBefore,
    Kronecker,
    Place,
    Sides,
    is_factored,
    with_bias,
)
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import learned, like_params
from jaxprop.core.types import Params, PyTree


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigen:
    """A block given by its eigenvectors, the products of a column of ``left`` and one of ``right``.

    Attributes:
        values: (I, O), the eigenvalues; like the other arrays, with leading axes for a stack of
            layers or for groups.
        left: (I, I), or None for the identity.
        right: (O, O).
        place: how the matrix (I, O) lies in the param.
    """

    values: Float[Array, "... i o"]
    left: Float[Array, "... i i"] | None
    right: Float[Array, "... o o"]
    place: Place = dataclasses.field(
        default=Place(), metadata={"static": True, "read": Place._make}
    )

    @property
    def size(self) -> int:
        """The number of param entries that the block covers."""
        return self.values.size

    @property
    def sides(self) -> Sides:
        """Both sides, as ``form.seen`` takes them."""
        return Sides(self.left, self.right)

    def coordinates(self, param: Array, *bias: Array) -> Float[Array, "... i o"]:
        """Return U^T g V, for g like the param; a bias, if given, is the last row of g."""
        *groups, rows, features = self.values.shape
        g = wide(self.place.matrices(param, (*groups, rows - len(bias), features)))
        below = [wide(b).reshape(*groups, 1, features).astype(g.dtype) for b in bias]
        half = jnp.concatenate([g, *below], axis=-2) @ self.right
        return half if self.left is None else self.left.swapaxes(-1, -2) @ half

    def params(self, coordinates: Float[Array, "... i o"], like: Sequence[Array]) -> list[Array]:
        """Return U coordinates V^T in the shape of the param and, if there is one, of the bias."""
        half = coordinates @ self.right.swapaxes(-1, -2)
        g = half if self.left is None else self.left @ half
        param, *bias = like
        rows = g.shape[-2] - len(bias)
        whole = self.place.param(g[..., :rows, :].astype(param.dtype), param.shape)
        return [whole, *(g[..., rows, :].astype(b.dtype).reshape(b.shape) for b in bias)]


Decomposed = Callable[[list[Array]], Sequence[tuple[Array, Array]]]
"""A function of symmetric matrices that returns the eigenvalues and the eigenvectors of each."""


def eigh(curvature: PyTree, decomposed: Decomposed | None = None) -> PyTree:
    """Return the curvature with an ``Eigen`` for each ``Kronecker``, for repeated use.

    Args:
        curvature: a tree like params, with a block at each leaf.
        decomposed: a function to decompose matrices; by default ``jnp.linalg.eigh`` on each.
    """
    blocks, structure = jax.tree.flatten(curvature, is_leaf=is_block)
    for block in blocks:
        _check_kind("eigh", block)
    factors = [block for block in blocks if isinstance(block, Kronecker)]
    diagonal = [block.a.ndim < block.b.ndim for block in factors]
    matrices = [block.b for block in factors]
    matrices += [block.a for block, is_so in zip(factors, diagonal, strict=True) if not is_so]
    pairs = iter((decomposed or _one_by_one)(matrices))
    of_b = [next(pairs) for _ in factors]
    of_a = [
        (block.a, None) if is_so else next(pairs)
        for block, is_so in zip(factors, diagonal, strict=True)
    ]

    def product(block: Kronecker, a: Any, b: tuple[Array, Array]) -> Eigen:
        values = jnp.maximum(a[0], 0)[..., :, None] * jnp.maximum(b[0], 0)[..., None, :]
        return Eigen(values, a[1], b[1], block.place)

    each = map(product, factors, of_a, of_b)
    return structure.unflatten(
        next(each) if isinstance(block, Kronecker) else block for block in blocks
    )


def _one_by_one(matrices: list[Array]) -> list[tuple[Array, Array]]:
    return [(values, vectors) for values, vectors in map(jnp.linalg.eigh, matrices)]


def times(curvature: PyTree, tree: Params) -> Params:
    """Return F times the tree.

    Args:
        curvature: F.
        tree: like params.
    """
    return _mapped("times", lambda values: values, curvature, tree)


def solve(curvature: PyTree, tree: Params, damping: float | Array = 0.0) -> Params:
    """Return (F + damping I)^-1 times the tree, block by block and without approximation.

    Args:
        curvature: F. To solve for many trees, pass one ``eigh`` of it under ``jax.vmap``.
        tree: like params, such as a gradient.
        damping: what is added to each eigenvalue. With 0, where F is singular, as it is for softmax
            logits, the result is either not finite or mere rounding error.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(3)), jp.CrossEntropy(), jnp.ones((4, 2))
        >>> params, target = net.init(jax.random.key(0), x), jnp.array([0, 1, 2, 0])
        >>> _, grads = jp.value_and_grad(net, loss)(params, x, target)
        >>> factors = jp.kronecker_factors(net, loss)(params, x, target)
        >>> step = jp.curvature.solve(factors, grads, damping=1e-3)
        >>> step[0].w.shape
        (2, 3)
    """
    check_number("solve: damping", damping)
    return _mapped("solve", lambda values: 1 / _damped(values, damping), curvature, tree)


def whiten(curvature: PyTree, tree: Params, damping: float | Array = 0.0) -> Params:
    """Return (F + damping I)^-1/2 times the tree, with the symmetric root.

    For a tree of standard normals it is a sample of the normal distribution with covariance
    (F + damping I)^-1.

    Args:
        curvature: F.
        tree: like params.
        damping: what is added to each eigenvalue.
    """
    check_number("whiten: damping", damping)

    def root(values: Array) -> Array:
        return jax.lax.rsqrt(_damped(values, damping))

    return _mapped("whiten", root, curvature, tree)


def logdet(curvature: PyTree, damping: float | Array = 0.0) -> Float[Array, ""]:
    """Return log det(F + damping I), over the entries of params that F has a block for.

    Params without a block, and entries that a function does not use, are left out.

    Args:
        curvature: F.
        damping: what is added to each eigenvalue.
    """
    check_number("logdet: damping", damping)
    blocks = jax.tree.leaves(eigh(learned(curvature)), is_leaf=is_block)
    values = [block.values if isinstance(block, Eigen) else block for block in blocks]
    logs = [jnp.sum(jnp.log(_damped(wide(v), damping))) for v in values]
    return added(*logs) if logs else jnp.zeros(())


def is_block(node: object) -> bool:
    """Return whether a node of a curvature is a block of factors.

    Args:
        node: a node of the tree, as ``jax.tree.map`` passes it to ``is_leaf``.
    """
    return isinstance(node, Kronecker | Eigen)


Pairs = list[tuple[Any, list[Any]]]


def paired(name: str, curvature: PyTree, tree: Params) -> Pairs:
    """Return each block with the leaf that it belongs to, or with the two leaves that share it.

    Raises:
        ValueError: for a curvature of other params.
    """
    leaves, structure = jax.tree.flatten(learned(tree))
    try:
        blocks = structure.flatten_up_to(learned(curvature))
    except ValueError:
        raise ValueError(
            f"{name}: the curvature is like params, with a block for each, and the tree like them "
            f"too; not {given(curvature)} for {shapes(tree)}"
        ) from None
    pairs: Pairs = []
    for block, leaf in zip(blocks, leaves, strict=True):
        if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name}: the tree is of floating arrays, like params, not {given(leaf)}"
            )
        if isinstance(block, InBlockBefore):
            pairs[-1][1].append(leaf)
        else:
            pairs.append((block, [leaf]))
    for block, of in pairs:
        _check_block(name, block, of)
    return pairs


def forms_of_blocks(
    name: str, curvature: PyTree, params: Params, forms: PyTree
) -> list[tuple[Any, Factored]]:
    """Return each block with its form; a matrix and a bias that share a block have one form.

    Args:
        name: the caller's name, for error messages.
        curvature: a tree like params, with a block at each leaf.
        params: the net's params.
        forms: a tree like the learned params, with a form at each leaf.
    """
    each = iter(jax.tree.leaves(forms, is_leaf=is_factored))
    found = []
    for block, leaves in paired(name, curvature, params):
        of = [next(each) for _ in leaves]
        form = with_bias(*of) if len(of) == 2 else of[0]
        if form is None:
            raise ValueError(f"{name}: a bias is in the block of a matrix that it is not added to")
        found.append((block, form))
    return found


def inverse_values(block: Any, damping: float | Array) -> Array:
    """Return 1 / (eigenvalue + damping), for an ``Eigen``, a diagonal, or ``()`` for 0."""
    values = block.values if isinstance(block, Eigen) else block
    return 1 / _damped(jnp.zeros(()) if isinstance(values, tuple) else wide(values), damping)


def _check_kind(name: str, block: Any) -> None:
    """Raise ``TypeError`` for a node that is not a block."""
    if not (isinstance(block, Kronecker | Eigen | InBlockBefore) or is_array(block)):
        raise TypeError(f"{name}: {given(block)} is not a block of a curvature")


def _check_block(name: str, block: Any, leaves: list[Array]) -> None:
    if type(block) is tuple and not block:
        return
    _check_kind(name, block)
    if isinstance(block, Kronecker | Eigen):
        fits = block.size == sum(leaf.size for leaf in leaves) or not block.place.is_whole
    else:
        fits = getattr(block, "shape", None) == leaves[0].shape
    if not fits:
        raise ValueError(f"{name}: {shapes(block)} is no block of {shapes(tuple(leaves))}")


def _mapped(name: str, f: Callable[[Array], Array], curvature: PyTree, tree: Params) -> Params:
    """Return f(F) times the tree, for a function f of the eigenvalues."""

    def of(block: Any, leaves: list[Array]) -> list[Array]:
        if isinstance(block, Kronecker):
            block = eigh(block)
        if isinstance(block, Eigen):
            mapped = block.params(f(block.values) * block.coordinates(*leaves), leaves)
            if block.place.is_whole:
                return mapped
            leaf = leaves[0]
            inside = block.place.param(jnp.ones_like(block.values), leaf.shape)
            return [jnp.where(inside > 0, mapped[0], f(jnp.zeros(())).astype(leaf.dtype) * leaf)]
        values = jnp.zeros(()) if isinstance(block, tuple) else wide(block)
        return [(f(values) * wide(leaf)).astype(leaf.dtype) for leaf in leaves]

    each = [leaf for pair in paired(name, curvature, tree) for leaf in of(*pair)]
    return like_params(tree, jax.tree.unflatten(jax.tree.structure(learned(tree)), each))


def _damped(values: Array, damping: float | Array) -> Array:
    return values + scalar_of(damping, values)
