"""The nodes of a tree of params: learned arrays, and arrays whose type says that they are not.

A plain array in a net's params is learned. An array that is not learned is wrapped in a type: an
``Unlearned`` array belongs to the params (running statistics, a fixed matrix, a frozen weight), and
a ``Key`` or a ``Mask`` is a side input, which ``net.bind`` puts there for one step.

Most trees hold only learned arrays; whether a tree does is cached by its structure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from jaxprop.core.describe import shapes
from jaxprop.core.serialization import serializable
from jaxprop.core.static import Static
from jaxprop.core.types import Cotangent, Params, PyTree


@dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True, repr=False)
class NotLearned:
    """An array in a tree of params that is not learned."""

    value: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        _, *facts = (field.name for field in dataclasses.fields(cls))
        jax.tree_util.register_dataclass(cls, data_fields=["value"], meta_fields=facts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


@serializable
class Unlearned(NotLearned):
    """An array in the params that is not learned, of any dtype.

    A layer's ``init`` marks running statistics or a fixed matrix this way, and ``jp.freeze`` marks
    weights. The array counts in no norm, and gets no noise, no update, no weight decay and no
    optimizer state. Its gradient is ``Unlearned(0)``, a scalar. ``forward`` and ``backward`` of a
    layer receive the array itself.

    Attributes:
        value: the array.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.Unlearned(jnp.array([True, False]))
        Unlearned(Array([ True, False], dtype=bool))
    """


class SideInput(NotLearned):
    """An array that a step hands to a layer, in the place of its params, through ``net.bind``."""


@serializable
class Key(SideInput):
    """A key from ``jax.random.key`` that a step hands to a layer.

    Attributes:
        value: the key; inside ``repeat`` an array of keys, one for each layer.
    """


@serializable
class Mask(SideInput):
    """A mask that a step hands to a layer.

    Attributes:
        value: bool (N, T), True where a position is real, or for attention (N, T, S) or
            (N, heads, T, S), True where a query sees a key; inside ``repeat`` after an axis of
            layers.
        rank: the number of axes of the mask, axes of layers not counted; by default all its axes.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is None:
            object.__setattr__(self, "rank", jnp.ndim(self.value))

    @property
    def axis(self) -> int:
        """The axis of the examples."""
        return jnp.ndim(self.value) - (self.rank or 0)

    def of(self, value: Any) -> Mask:
        """Return the mask with another value of the same rank."""
        return Mask(value, self.rank)


def is_not_learned(node: object) -> bool:
    """Return whether a node of a tree is of a type that marks it as not learned."""
    return isinstance(node, NotLearned)


@functools.lru_cache(maxsize=4096)
def typed(structure: Any) -> bool:
    """Return whether a tree of this ``jax.tree.structure`` has a node that is not learned."""
    tree = jax.tree.unflatten(structure, [0] * structure.num_leaves)
    return any(map(is_not_learned, jax.tree.leaves(tree, is_leaf=is_not_learned)))


def freeze(params: Params) -> Params:
    """Return params with every array marked as ``Unlearned``, so that training leaves it alone.

    Args:
        params: the params of a layer or of a whole net.

    Raises:
        TypeError: for a net, which has no arrays, and for leaves that are not arrays.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3)), jnp.ones((2, 4))
        >>> body, tanh, head = net.init(jax.random.key(0), x)
        >>> params = (jp.freeze(body), tanh, head)  # of this net only the head is trained
    """
    if isinstance(params, Static):
        raise TypeError(
            f"freeze takes params; {params} is a net. Write jp.freeze(params), or jp.frozen(net)"
        )

    def marked(node: Any) -> NotLearned:
        if isinstance(node, type | str):
            raise TypeError(f"freeze takes params, whose leaves are arrays, not {node!r}")
        return node if is_not_learned(node) else Unlearned(node)

    return jax.tree.map(marked, params, is_leaf=is_not_learned)


def unbound(params: Params) -> Params:
    """Return params without the side inputs that ``net.bind`` put among them."""
    return _replaced(params, lambda node: () if isinstance(node, SideInput) else node)


def learned(tree: PyTree) -> PyTree:
    """Return the tree with ``()`` for each node that is not learned."""
    return _replaced(tree, lambda node: ())


def for_optimizer(tree: PyTree) -> PyTree:
    """Return the tree as an optimizer sees it: without arrays that are not learned.

    An ``Unlearned`` node stays, but empty, so that a mask from ``jax.tree.map`` of params fits.
    """
    return _replaced(tree, lambda node: Unlearned(()) if isinstance(node, Unlearned) else ())


def check_learned(params: Params) -> None:
    """Raise ``TypeError`` for an array that no gradient can move and that is not ``Unlearned``."""
    for path, leaf in jax.tree.leaves_with_path(learned(params)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {shapes(leaf)}, which no gradient moves: "
                "mark it in init, by jp.Unlearned(array)"
            )


def arrays(params: Params) -> Params:
    """Return params as a layer computes with them: unlearned arrays without their type.

    Those are held constant, so that autodiff of ``forward`` gives them a gradient of zero.
    """
    return _replaced(
        params,
        lambda node: jax.lax.stop_gradient(node.value) if isinstance(node, Unlearned) else node,
    )


def bare(params: Params) -> Params:
    """Return params without types: the arrays that ``init`` makes, and no side inputs."""
    return _replaced(params, lambda node: node.value if isinstance(node, Unlearned) else ())


def merged(params: Params, tree: PyTree) -> Params:
    """Return params with the learned arrays from ``tree``, which is like ``learned(params)``."""
    return _replaced_where(params, tree, lambda node: node)


def learned_cotangents(params: Params, d_params: Cotangent) -> Cotangent:
    """Return d_params with ``()`` where a type in params says "not learned".

    If the structures differ, d_params is returned as it is, and the code that uses it reports this.
    """
    try:
        return _replaced_where(params, d_params, lambda node: ())
    except ValueError:
        return d_params


def like_params(params: Params, tree: PyTree, *, shape: tuple[int, ...] = ()) -> PyTree:
    """Return the tree with zeros where params have an unlearned array, so that it is like params.

    Args:
        params: a tree of params, with or without side inputs.
        tree: a result like ``learned(params)``.
        shape: the shape of the zeros. A scalar is enough for an update: p + 0 has the shape of p.
    """

    def zeros(node: NotLearned) -> Any:
        if isinstance(node, SideInput):
            return ()
        if isinstance(node.value, tuple):  # empty, as in ``for_optimizer``
            return node
        return Unlearned(jnp.zeros(shape, jnp.result_type(node.value)))

    return _replaced_where(params, tree, zeros)


def without_unmarked(params: Params, d_params: Cotangent) -> Params:
    """Return params with ``()`` for an unmarked bool or integer that d_params has ``()`` for.

    Such a leaf is not learned if ``backward`` says so. If the structures differ, params are
    returned as they are, and the code that uses the cotangents reports this.
    """
    leaves, structure = jax.tree.flatten(params)
    try:
        each = structure.flatten_up_to(d_params)
    except ValueError:
        return params
    kept = [
        type(d) is not tuple or d != () or jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        for leaf, d in zip(leaves, each, strict=True)
    ]
    if all(kept):
        return params
    return jax.tree.unflatten(
        structure, [leaf if keep else () for leaf, keep in zip(leaves, kept, strict=True)]
    )


def map_modules(f: Callable[..., Any], params: Params, *others: PyTree) -> PyTree:
    """Return params with ``f(module, *others)`` in the place of each module.

    A module is a node of the tree with nothing but arrays in it, such as the kernel and the bias of
    a dense layer, or an array next to other nodes. A node without arrays stays as it is.

    Args:
        f: a function of a module and of the nodes in its place in the others.
        params: a tree of params.
        others: trees that have the structure of params down to the arrays.
    """
    if is_not_learned(params) or jax.tree_util.all_leaves([params]):
        return f(params, *others)
    nodes, structure = jax.tree.flatten(params, is_leaf=lambda node: node is not params)
    if not nodes:
        return params
    if all(is_not_learned(node) or jax.tree_util.all_leaves([node]) for node in nodes):
        return f(params, *others)
    each = zip(nodes, *map(structure.flatten_up_to, others), strict=True)
    return jax.tree.unflatten(structure, [map_modules(f, *node) for node in each])


def numbered(params: Params) -> PyTree:
    """Return params with each leaf, and each node that is not learned, replaced by its number."""
    structure = jax.tree.structure(params, is_leaf=is_not_learned)
    return jax.tree.unflatten(structure, range(structure.num_leaves))


def axes_of_examples(params: Params) -> PyTree:
    """Return the ``in_axes`` of a ``jax.vmap`` over examples: a mask's example axis, else None."""
    return jax.tree.map(
        lambda node: node.axis if isinstance(node, Mask) else None, params, is_leaf=is_not_learned
    )


def of_one_example(params: Params) -> Params:
    """Return params for a batch of one; masks come without their example axis, and get one."""

    def alone(node: NotLearned) -> NotLearned:
        if not isinstance(node, Mask):
            return node
        return node.of(jnp.expand_dims(node.value, node.axis + 1))

    return _replaced(params, alone)


def _replaced(tree: PyTree, by: Callable[[NotLearned], Any]) -> PyTree:
    """Return the tree with ``by(node)`` for every node that is not learned."""
    if not typed(jax.tree.structure(tree)):
        return tree
    return jax.tree.map(
        lambda node: by(node) if is_not_learned(node) else node, tree, is_leaf=is_not_learned
    )


def _replaced_where(params: Params, tree: PyTree, by: Callable[[NotLearned], Any]) -> PyTree:
    """Return the tree with ``by(node)`` where params have a node that is not learned."""
    if not typed(jax.tree.structure(params)):
        return tree
    return jax.tree.map(
        lambda node, here: by(node) if is_not_learned(node) else here,
        params,
        tree,
        is_leaf=is_not_learned,
    )
