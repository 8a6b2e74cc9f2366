"""The layer of any JAX function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import on_device
from jaxprop.core.checks import given
from jaxprop.core.combinator import map_children
from jaxprop.core.describe import is_array, shapes
from jaxprop.core.layer import Layer
from jaxprop.core.step import Step, Visit, params_of
from jaxprop.core.tree import arrays, is_not_learned, map_modules
from jaxprop.core.types import Cotangent, Params, PyTree, Visited
from jaxprop.traced.coupling import check_uncoupled_function
from jaxprop.traced.coverage import Coverage, coverage_of, warn_of_large_shares
from jaxprop.traced.example import Example
from jaxprop.traced.ruled import Rule, Ruled
from jaxprop.traced.walking import Back, Module, Walked, walk_ahead

Fn: TypeAlias = Callable[..., PyTree]


class Function(Layer):
    """y = fn(params, x) for any pure JAX function; made by ``jp.function``.

    fn is traced for one example. Where a param, or a value that holds its entries in another order,
    meets data in a matrix product, a convolution or a look-up of rows, a zero is added to the
    result. By the chain rule the zero's cotangent is ct, the cotangent of the result; together with
    the data x it makes the param's form. All other uses of a param see param + 0, with a separate
    zero for each example, whose cotangent is that example's own share of the gradient. ``jax.vjp``
    of the function over all examples (``jax.vmap``) walks back, with whatever derivative rules the
    function contains. Params are not batched there, so the product of a batch with a param stays
    one product.

    A param has a ``Repeated`` form if a ``lax.scan`` iterates over its layers. If the scan iterates
    over whole modules whose params have no other use, each layer is visited as soon as the walk
    back reaches it. If a param is a constant of the scan, the steps are positions. Uses in which
    its entries lie in the same order share one form, over the positions of all these uses;
    different orders are combined in a ``Joint`` form.

    Attributes:
        fn: the function.
        init_fn: the function that ``init`` calls, or None.
        watching: whether ``forward`` also saves the results of named scopes, for ``jp.explain``.
        by_forward_rules: whether the derivative of y along params is that of the tapped program,
            for forward-over-reverse. With rules of ``jp.rules`` it is always that of fn without
            the rules.
    """

    fn: Fn
    init_fn: Fn | None = None
    watching: bool = False
    by_forward_rules: bool = False
    hands_down_types = True
    by_module = True

    @property
    def is_derivative(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not isinstance(self.fn, Ruled)

    @property
    def is_linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.is_derivative  # the layers that rules return are known only in a trace of fn

    def __post_init__(self) -> None:
        for name in ("fn", "init_fn"):
            value: Any = getattr(self, name)
            if value is None and name == "init_fn":
                continue
            if isinstance(value, type | Layer) or not callable(value):
                raise TypeError(f"function takes a function of (params, x), not {given(value)}")
            try:
                hash(value)
            except TypeError:  # a method of an unhashable object, such as one with a dict field
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
        """Check that fn can take the params, and that every leaf of x has the example on axis 0."""
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

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Walked]:
        x = jax.tree.map(on_device, x)
        one = Example.of(self.fn, repr(self), params, x, self.watching)
        check_uncoupled_function(self.fn, repr(self), arrays(params), x)
        warn_of_large_shares(repr(self), one, params, jax.tree.leaves(x)[0].shape[0])
        with _noted(self):
            y, walked = walk_ahead(one, x)
        if isinstance(self.fn, Ruled):
            return _derived(self.fn.fn, params, x, y), walked
        return y if self.by_forward_rules else _derived(self.fn, params, x, y), walked

    def backward(self, params: Params, residuals: Walked, ct: Cotangent) -> tuple[Params, PyTree]:
        return self.walk(params, residuals, ct, lambda step: step.d_params)

    def walk(
        self, place: PyTree, residuals: Walked, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        params = params_of(place, visit)
        modules, back = Module.all(params, place), Back(residuals, ct)
        with _noted(self):
            visited = back.go(self, modules, visit)
        d_x = jax.tree.unflatten(residuals.facts.structure, back.d_x())
        for number, module in enumerate(modules):
            if number not in visited:
                d_params = back.d_params(module)
                step = Step.of(self, module.params, residuals, ct, d_params, d_x, module.place)
                visited[number] = visit(step)
        each = map(visited.__getitem__, range(len(modules)))
        return map_modules(lambda _: next(each), params), d_x

    def coverage(self, params: Params, x: PyTree) -> Coverage:
        """Return where each param meets data, and the form of its cotangent.

        The result prints as a table. The gradient of a param that meets no data is
        formed for each example, where it is as large as the param.

        Args:
            params: the params, as arrays or as ``jax.ShapeDtypeStruct``.
            x: a batch, as arrays or as ``jax.ShapeDtypeStruct``.
        """
        self.check_params(params, x)
        one = Example.of(self.fn, repr(self), params, x)
        return coverage_of(one, params, jax.tree.leaves(x)[0].shape[0])


def function(
    fn: Fn, init: Fn | None = None, *, rules: Mapping[str, Rule] | None = None
) -> Function:
    """Return a layer that computes a pure JAX function, from any library.

    Every quantity, clipping, curvature, micro-batches and updates work with it as with any layer:

        net = jp.function(model.apply)
        value, grads = jp.clipped_grad(net, jp.CrossEntropy(), 1.0)(params, x, target)

    fn may also be a whole loss, of params and a batch, that returns the mean over examples or a
    value for each example. Use ``jp.Mean()`` as the loss then, without a target:

        net = jp.function(loss_fn)
        norms = jp.per_example_sq_norms(net, jp.Mean())(params, (x, target))

    If fn returns a value and an aux, use ``jp.loss(operator.itemgetter(0))`` as the loss; with
    ``aux=True`` a quantity then returns the aux of each example as ``aux.y[1]``.

    ``net.coverage(params, x)`` shows which params keep their cotangents as factors, and where.

    fn is called with a batch of one example, and must return the y that this example has in any
    batch. This is tried on two examples of random numbers, once per set of shapes, while tracing;
    if the batch changes an example's y, ``ValueError`` names the operation. An input without
    examples, such as a step count, goes into params as ``jp.Unlearned(array)``. A function that
    draws random numbers takes a key for each example, in x:
    ``(images, jax.random.split(key, len(images)))``, and ``keys[0]`` in fn.

    ``jax.jit`` recognizes the function by the object fn, so pass the same object each time: with a
    new lambda for each call, each call is compiled. Without ``jit`` each call traces fn.

    Args:
        fn: ``fn(params, x) -> y``, where x and y are pytrees of arrays with the example on axis 0,
            or y is a scalar. Flax's ``model.apply`` is such a function; for Equinox write
            ``lambda params, x: jax.vmap(eqx.combine(params, static))(x)``.
        init: ``init(key, x) -> params``, for ``net.init``, also where the function is inside
            ``chain`` or ``repeat``.
        rules: other backward rules for parts of the function, whose code stays as it is. Each key
            maps to a function of a layer, such as those of ``jp.rules``. A key is the name of a
            primitive ("dot_general"), of a function that is jitted or has a custom derivative rule
            ("relu"), or of a scope, such as a Flax module's ("Dense_0"). The scope is then one
            layer, and so is a scope that is entered twice in a row under the same names. Outer
            scopes may come first ("Block_1/Dense_0/dot_general"). Those inputs of the part that
            depend on x are its x, and the others are its params; if none depends on x, the params
            are its x. The rule changes the cotangent of the part's x; params have their true
            derivative for the cotangent that arrives at the part. A rule cannot have params of its
            own: ``feedback_alignment`` takes a ``seed``. As for any layer with another rule,
            ``jax.grad`` of ``jp.loss_fn`` is the true derivative.

    Raises:
        TypeError: if fn is not a function, or a rule needs something that its part does not have.
        ValueError: if no part matches the key of a rule.

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
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(f"function: rules are a dict of a rule for each key, not {given(rules)}")
    if not rules:
        return Function(fn, init)
    return Function(Ruled(fn, tuple(rules.items())), init)


def with_forward_rules(layer: Layer) -> Layer:
    """Return the same layer, whose functions can be differentiated along params in forward mode.

    Forward-over-reverse then differentiates the forward rule of a ``jax.custom_vjp`` function,
    where ``jax.jvp`` of the function itself raises.
    """
    if isinstance(layer, Function):
        return dataclasses.replace(layer, by_forward_rules=True)
    return map_children(layer, with_forward_rules)


def _derived(fn: Fn, params: Params, x: PyTree, y: PyTree) -> PyTree:
    """Return y, which was computed for these examples, with the derivative of fn attached.

    y comes from the tapped program, which ``jax.vjp`` has already differentiated. A derivative of
    that would be a second derivative, which ignores the ``jax.custom_vjp`` rules inside fn.
    """

    @jax.custom_jvp
    def found(params: Params, x: PyTree, y: PyTree) -> PyTree:
        del params, x
        return y

    def alone(params: Params, x: PyTree) -> PyTree:
        y = fn(arrays(params), jax.tree.map(lambda leaf: leaf[None], x))
        return jax.tree.map(lambda leaf: leaf[0] if jnp.ndim(leaf) else leaf, y)

    @found.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        return jax.jvp(jax.vmap(alone, (None, 0)), primals[:2], tangents[:2])

    return found(params, x, y)


def _stand_in(leaf: Any) -> Any:
    """Return zeros for a ``jax.ShapeDtypeStruct``: a model that runs in its init needs arrays."""
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
