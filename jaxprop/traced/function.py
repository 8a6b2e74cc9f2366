"""The layer of any JAX function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import on_device
from jaxprop.core.checks import given
from jaxprop.core.describe import is_array, shapes
from jaxprop.core.forms import Factored, Moves, Stacked, Sum
from jaxprop.core.layer import Layer
from jaxprop.core.tree import arrays, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.traced.coupling import check_uncoupled_function
from jaxprop.traced.coverage import Coverage, coverage_of, warn_of_large_shares
from jaxprop.traced.example import Example, zeros
from jaxprop.traced.shares import share, together
from jaxprop.traced.taps import Use, is_inexact
from jaxprop.traced.views import placed

Fn: TypeAlias = Callable[..., PyTree]


class Function(Layer):
    """y = fn(params, x) for any pure JAX function; ``jp.function`` makes one.

    fn is traced for one example. Where a param, or a value that holds its entries in another order,
    meets data in a matrix product, a convolution or a look-up of rows, a zero is added to the
    result. By the chain rule the zero's cotangent is ct, that of the result, and with the data x it
    makes the param's form. Whatever else is done with a param is done with param + 0, a zero for
    each example, whose cotangent is that example's own share of the gradient. ``jax.vjp`` of the
    function over all examples (``jax.vmap``) walks back, by whatever rules are in it: params are
    not batched there, so that the product of a batch with one of them stays one product.

    A param that a ``lax.scan`` goes through layer by layer has a ``Repeated`` form. If it is a
    constant of the scan, the steps are positions. Uses in which its entries lie in the same order
    are one form, over the positions of all; others make a ``Joint`` one.

    Attributes:
        fn: the function.
        init_fn: what ``init`` calls, or None.
        watching: whether ``forward`` also saves the results of named scopes, for ``jp.explain``.
    """

    fn: Fn
    init_fn: Fn | None = None
    watching: bool = False
    hands_down_types = True
    by_module = True

    def __post_init__(self) -> None:
        for name in ("fn", "init_fn"):
            value: Any = getattr(self, name)
            if value is None and name == "init_fn":
                continue
            if isinstance(value, type | Layer) or not callable(value):
                raise TypeError(f"function takes a function of (params, x), not {given(value)}")
            try:
                hash(value)
            except TypeError:  # a method of what cannot be hashed, such as a dict among its fields
                object.__setattr__(self, name, functools.partial(value))

    def __repr__(self) -> str:
        return f"function({getattr(self.fn, '__qualname__', repr(self.fn))})"

    def init(self, key: Array, x: PyTree) -> Params:
        if self.init_fn is None:
            raise TypeError(
                f"{self}: its params come from where the function does; for net.init(key, x) write "
                "jp.function(fn, init), such as jp.function(model.apply, model.init)"
            )
        return self.init_fn(key, jax.tree.map(_stand_in, x))

    def check_params(self, params: Params, x: PyTree) -> None:
        """Raise for what are no params, or no x with the example on axis 0 of every leaf."""
        for path, leaf in jax.tree.leaves_with_path(params):
            if not is_array(leaf) and not isinstance(leaf, int | float):
                name = jax.tree_util.keystr(path)
                raise TypeError(f"{self}: params{name} is {given(leaf)}, not an array")
        for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_not_learned):
            if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                name = jax.tree_util.keystr(path)
                raise TypeError(
                    f"{self}: params{name} is {leaf.dtype}; what is learned is real: keep its real "
                    "and its imaginary part, or mark it as jp.Unlearned"
                )
        leaves = jax.tree.leaves(x)
        if not leaves or not all(map(is_array, leaves)):
            raise TypeError(f"{self} takes x as arrays, not {shapes(x)}")
        sizes = {leaf.shape[:1] for leaf in leaves}
        if len(sizes) > 1 or () in sizes:
            raise ValueError(
                f"{self} takes x with the example on axis 0 of every leaf, not {shapes(x)}; what "
                "is no example goes into params, as jp.Unlearned(array)"
            )

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Tape]:
        x = jax.tree.map(on_device, x)
        one = Example.of(self.fn, repr(self), params, x, self.watching)
        check_uncoupled_function(self.fn, repr(self), arrays(params), x)
        leaves = jax.tree.leaves(x)
        warn_of_large_shares(repr(self), one, params, leaves[0].shape[0])
        moving = tuple(map(is_inexact, leaves))

        def of_batch(taps: Any, owns: Any, some: list[Array]) -> tuple[list[Array], Any]:
            outs, xs = jax.vmap(one.run)(taps, owns, placed(some, moving, leaves))
            return list(filter(is_inexact, outs)), (outs, xs)

        taps = [zeros(leaves, struct) for struct in one.taps]
        owns = {index: zeros(leaves, one.params[index]) for index in one.owned}
        some = list(filter(is_inexact, leaves))
        with _noted(self):
            moved, pull, (outs, xs) = jax.vjp(of_batch, taps, owns, some, has_aux=True)
        moves = tuple(map(is_inexact, outs))
        outs = placed(moved, moves, outs)
        facts = Facts(one.uses, one.learned, jax.tree.structure(x), moving, one.structure, moves)
        return jax.tree.unflatten(one.structure, outs), Tape(pull, xs, facts)

    def backward(self, params: Params, residuals: Tape, ct: Cotangent) -> tuple[Params, PyTree]:
        facts = residuals.facts
        each_ct = zip(facts.y.flatten_up_to(ct), facts.moves, strict=True)
        cts = [each for each, moves in each_ct if moves]
        with _noted(self):
            taps, owns, d_some = residuals.pull(cts)
        shares: dict[int, list[tuple[Factored, Moves]]] = {i: [] for i in facts.learned}
        for use, x, ct_here in zip(facts.uses, residuals.xs, taps, strict=True):
            for part in use.parts:
                shares[part.param].append(share(use, part, x, ct_here))
        for index, own in owns.items():
            shares[index].append((Sum(own) if own.ndim == 2 else Stacked(own), ()))
        leaves, structure = jax.tree.flatten(params, is_leaf=is_not_learned)
        for index, each in shares.items():
            if not each:  # y does not depend on it
                beside = [*cts, *residuals.xs, *d_some]
                each.append((Stacked(zeros(beside, leaves[index])), ()))
        d_params = [
            together(shares[index]) if index in shares else () for index in range(len(leaves))
        ]
        d_x = placed(d_some, facts.moving, [None] * len(facts.moving))
        return jax.tree.unflatten(structure, d_params), jax.tree.unflatten(facts.x, d_x)

    def coverage(self, params: Params, x: PyTree) -> Coverage:
        """Return, for each param, what data it meets, where, and what form its cotangent has.

        It prints as a table. A param that meets none has each example's own share for a form,
        which is as large as the param for each example.

        Args:
            params: the params, or their ``jax.ShapeDtypeStruct``.
            x: a batch, likewise.
        """
        self.check_params(params, x)
        one = Example.of(self.fn, repr(self), params, x)
        return coverage_of(one, params, jax.tree.leaves(x)[0].shape[0])


class Facts(NamedTuple):
    """What is known of a walk without its arrays.

    Attributes:
        uses: where params meet data.
        learned: the numbers of the params that are learned.
        x: the structure of x.
        moving: for each leaf of x, whether it has a cotangent: is floating or complex.
        y: the structure of y.
        moves: for each leaf of y, whether it has a cotangent.
    """

    uses: tuple[Use, ...]
    learned: frozenset[int]
    x: Any
    moving: tuple[bool, ...]
    y: Any
    moves: tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tape:
    """What ``forward`` saves.

    Attributes:
        pull: the way back from y, of ``jax.vjp``: to the zeros at the uses, to those of owned
            params, and to x.
        xs: the data at each use.
        facts: what has no arrays.
    """

    pull: Any
    xs: list[Array]
    facts: Facts = dataclasses.field(metadata={"static": True})


def function(fn: Fn, init: Fn | None = None) -> Function:
    """Return the layer of a pure JAX function, whatever made it.

    Every quantity, clipping, curvature, micro-batches and updates work for it as for any layer:

        net = jp.function(model.apply)
        value, grads = jp.clipped_grad(net, jp.CrossEntropy(), 1.0)(params, x, target)

    fn may also be a whole loss, of params and a batch, that returns the mean over examples or a
    value for each; with ``jp.Mean()`` for the loss the target is left out:

        net = jp.function(loss_fn)
        norms = jp.per_example_sq_norms(net, jp.Mean())(params, (x, target))

    ``net.coverage(params, x)`` shows which params keep their cotangents in factors, and where.

    fn is called with a batch of one example, and must give it the y that it has in any batch. It is
    tried, once for its shapes, while tracing, on two examples of random numbers; if the batch moves
    an example's y, ``ValueError`` names the operation. What is no example, such as a step count,
    goes into params as ``jp.Unlearned(array)``. What draws takes a key for each example, in x:
    ``(images, jax.random.split(key, len(images)))``, and ``keys[0]`` in fn.

    It is traced by ``jax.jit``, so that a fn is one object: a lambda that is written anew for each
    call is compiled anew. Without ``jit`` each call traces it.

    Args:
        fn: ``fn(params, x) -> y``, with the example on axis 0 of every array of x and y, which are
            pytrees; or y a scalar. ``model.apply`` of Flax is one, of Equinox
            ``lambda params, x: jax.vmap(eqx.combine(params, static))(x)``.
        init: ``init(key, x) -> params``, for ``net.init`` and for a function inside of ``chain`` or
            ``repeat``.

    Raises:
        TypeError: for what is not a function.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> def loss_fn(params, batch):
        ...     x, target = batch
        ...     return jnp.mean((jnp.tanh(x @ params["w"]) - target) ** 2)
        >>> net, params = jp.function(loss_fn), {"w": jnp.eye(3)}
        >>> batch = jnp.eye(3), jnp.zeros((3, 3))
        >>> jp.per_example_sq_norms(net, jp.Mean())(params, batch).shape
        (3,)
    """
    return Function(fn, init)


def _stand_in(leaf: Any) -> Any:
    """Return zeros for a ``jax.ShapeDtypeStruct``, as models that run in their init need arrays."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


@contextlib.contextmanager
def _noted(net: Function) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(
            f"{net} is differentiated by what is floating in x too; what has no derivative by x "
            "takes jax.lax.stop_gradient(x)"
        )
        raise
