"""``jp.check_vjp``: a function's custom differentiation rule compared with each oracle."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.checking.arguments import Arguments, Point, widened
from jaxprop.checking.compare import compare
from jaxprop.checking.differences import DOUBLE, Precision, check_differences
from jaxprop.checking.oracles import fitted
from jaxprop.checking.points import normal, wide, with_noise
from jaxprop.core.arrays import is_floating
from jaxprop.core.checks import check_number, given
from jaxprop.core.describe import shapes
from jaxprop.core.types import PyTree

DIRECTIONS = 3
GIVER = "the rule"
EACH = ("the first of three", "the second of three", "the third of three")
Fn = Callable[..., PyTree]
Rule: TypeAlias = "jax.custom_vjp[Any] | jax.custom_jvp[Any]"
Outputs = list[Array]


class Exactness(NamedTuple):
    """The accuracy that a function's dtypes allow.

    Attributes:
        rtol: the relative error of a leaf.
        large: the factor on ct that exposes a rule that is linear only for small ct.
        differences: the precision of central differences.
    """

    rtol: float
    large: float
    differences: Precision


EXACTNESS = {  # by the text that a jaxpr with such floats contains
    "f16[": Exactness(5e-2, -16.0, Precision(2.0**-8, 0.2, 0.2)),  # bf16[ too
    "f32[": Exactness(1e-4, -1024.0, Precision(2.0**-23, 5e-3, 5e-3)),
    "": Exactness(1e-10, -1024.0, DOUBLE),
}


def check_vjp(f: Fn, *args: Any, seed: int = 0, rtol: float | None = None) -> None:
    """Check the derivative of a function with a custom rule; raise if it is wrong.

    f is a function decorated by ``jax.custom_vjp`` or ``jax.custom_jvp``, or any other. Its
    arguments are pytrees, and it is differentiated with respect to their floating leaves. Other
    leaves (integers, booleans, keys, functions) and the arguments that ``nondiff_argnums`` names
    are held constant. Floats are converted to float64 if f accepts that. For several random
    cotangents ct of y, every cotangent must

    - have the structure, shape and dtype of its argument, also for the dtypes that were given,
    - be finite, as y must be,
    - be linear in ct, for small ct and for large,
    - be the same under ``jax.jit``,
    - be the same under ``jax.vmap`` over three points, and over three ct at one point,
    - equal ``jax.vjp`` of the undecorated function (its ``fun``), near the point, where that can be
      differentiated and is finite,
    - agree with central differences of f in a random direction, leaf by leaf, near the point and,
      unless there is a kink, at it.

    y must be the same whether or not f is differentiated. An input that f holds constant by
    ``jax.lax.stop_gradient`` does not agree with differences, nor does a rule that deliberately is
    not the derivative.

    ``jax.test_util.check_grads`` compares one number: the inner product over all leaves of one
    tangent with the cotangents for one ct, at the dtypes that were given. So it passes a rule that
    is wrong by less than 1e-5 of that number in float64, or 2e-3 in float32, which hides a wrong
    leaf next to a large one. It also passes a rule that ``jit`` or ``vmap`` break, one that returns
    another dtype, and one that is right for that ct but not for another:

        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> from jax.test_util import check_grads
        >>> @jax.custom_vjp
        ... def scaled(x, scale):
        ...     return x * scale
        >>> def forward(x, scale):
        ...     return x * scale, (x, scale)
        >>> def backward(residuals, ct):
        ...     x, scale = residuals
        ...     ct = jnp.clip(ct, -3, 3)  # not linear
        ...     return ct * scale, jnp.sum(ct * x)
        >>> scaled.defvjp(forward, backward)
        >>> x, scale = jnp.ones(3), jnp.array(2.0)
        >>> check_grads(scaled, (x, scale), order=1, modes=["rev"])
        >>> jp.check_vjp(scaled, x, scale)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: scaled: d_scale disagrees with linearity in ct: ...

    Args:
        f: the function, which ``jax.jit`` can trace.
        *args: the arguments to check it at. Do not check at a kink, such as 0 for a relu.
        seed: the seed of noise and directions.
        rtol: the largest difference allowed in a leaf, relative to the leaf's largest element. By
            default 1e-10, or 1e-4 for a function that computes in float32, or 5e-2 in 16 bits.
            Central differences are allowed 1e-6, 5e-3 and 0.2.

    Raises:
        AssertionError: for the first disagreement. The message names the function, the argument and
            its leaf (``d_params['w']``), the index of the worst element, both values and the
            relative error.
        TypeError: for arguments that f does not take, and for complex numbers.
        ValueError: if there is nothing to check, since no argument or no output holds floats, and
            for a float that is not finite.
    """
    if not callable(f):
        raise TypeError(f"check_vjp takes a function, not {given(f)}")
    if rtol is not None:
        check_number("check_vjp: rtol", rtol)
    rule = _rule_of(f)
    arguments = Arguments.of(f, args, rule.nondiff_argnums if rule is not None else ())
    point = arguments.point()
    if not any(leaf.size for leaf in point.values()):
        raise ValueError(f"check_vjp: nothing to check, no argument of {name_of(f)} holds floats")
    _Check(f, rule, arguments, point, np.random.default_rng(seed), rtol).check_form()
    with jax.enable_x64(True):
        double = widened(point)
        takes = _traces(functools.partial(_floats_of, f, arguments), double)
    with jax.enable_x64(True) if takes else contextlib.nullcontext():
        at = double if takes else point
        _Check(f, rule, arguments, at, np.random.default_rng(seed), rtol).run()


class _Check:
    """The check of one function.

    Attributes:
        who: the function's name.
        rule: the object that ``jax.custom_vjp`` or ``jax.custom_jvp`` returned; None without one.
        arguments: its arguments.
        point: the floating leaves of the arguments.
    """

    def __init__(
        self,
        f: Fn,
        rule: Rule | None,
        arguments: Arguments,
        point: Point,
        rng: np.random.Generator,
        rtol: float | None,
    ) -> None:
        self.who = name_of(f)
        self.rule, self.arguments, self.point, self._rng = rule, arguments, point, rng
        self._output = functools.partial(_floats_of, f, arguments)
        text = str(jax.make_jaxpr(self._output)(point))
        self._exactness = next(each for name, each in EXACTNESS.items() if name in text)
        self._rtol = self._exactness.rtol if rtol is None else rtol

    def run(self) -> None:
        """Raise for the first disagreement."""
        point, structs = self.point, jax.eval_shape(self._output, self.point)
        if not structs:
            raise ValueError(f"check_vjp: nothing to check, y of {self.who} holds no floats")
        self.check_form()
        output, pulled = jax.jit(self._output), jax.jit(self._pulled)
        for _ in range(DIRECTIONS):
            ct, other = (normal(self._rng, structs) for _ in range(2))
            y, got = self._pulled(point, ct)
            self._check_y(output(point), y)
            self._check_finite(got)
            self._compare(got, self._by_linearity(point, ct, other), "linearity in ct", ct)
            self._compare(got, pulled(point, ct)[1], "itself under jit", ct)
            near = with_noise(self._rng, point, 0.01)
            self._check_vmap(
                pulled, [near, point, with_noise(self._rng, point, 0.1)], [other, ct, ct]
            )
            self._check_fun(pulled, near, ct)
            self._check_differences(output, point, got, ct, kinks=True)
            self._check_differences(output, near, pulled(near, ct)[1], ct, kinks=False)

    def _pulled(self, point: Point, ct: Outputs) -> tuple[Outputs, Point]:
        """Return y and the cotangents."""
        y, pull = jax.vjp(self._output, point)
        (d_point,) = pull(ct)
        return y, d_point

    def _by_linearity(self, point: Point, ct: Outputs, other: Outputs) -> Point:
        large = self._exactness.large
        both = jax.tree.map(lambda a, b: (large * a + b).astype(a.dtype), ct, other)
        (_, of_both), (_, of_other) = (self._pulled(point, c) for c in (both, other))
        return jax.tree.map(lambda a, b: (a - b) / large, of_both, of_other)

    def check_form(self) -> None:
        """Raise unless the cotangents fit the arguments, the rule's own before those from JAX."""
        rule, point, args = self.rule, self.point, self.arguments.at(self.point)
        if isinstance(rule, jax.custom_vjp) and not rule.symbolic_zeros and rule.fwd and rule.bwd:
            fwd, bwd = rule.fwd, rule.bwd
            fixed = [arg for index, arg in enumerate(args) if index in self.arguments.held]
            names = [n for i, n in enumerate(self.arguments.names) if i not in self.arguments.held]
            primals = [arg for index, arg in enumerate(args) if index not in self.arguments.held]

            def raw(floats: Point) -> PyTree:
                y, residuals = fwd(*self.arguments.at(floats))
                return bwd(*fixed, residuals, jax.tree.map(_one, y))

            found: list[PyTree] = []
            jax.eval_shape(lambda floats: found.append(raw(floats)), point)
            (d_args,) = found
            if not isinstance(d_args, tuple) or len(d_args) != len(primals):
                raise AssertionError(
                    f"{self.who}: the rule gives {shapes(d_args)}, not a tuple of a cotangent for "
                    f"each of {', '.join(names)}"
                )
            by_name = dict(zip(names, map(_zeros_for_none, d_args, primals), strict=True))
            fitted(self.who, dict(zip(names, primals, strict=True)), by_name)
        _, pull = jax.vjp(self._output, point)
        structs = jax.eval_shape(self._output, point)
        fitted(self.who, point, pull([jnp.ones(y.shape, y.dtype) for y in structs])[0])

    def _check_y(self, plain: Outputs, y: Outputs) -> None:
        for place, (a, b) in enumerate(zip(plain, y, strict=True)):
            if not np.isfinite(wide(a)).all():
                raise AssertionError(f"{self.who}: y is not finite at the point that is checked")
            scale = np.max(np.abs(wide(a)), initial=0.0)
            difference = np.abs(wide(a) - wide(b))
            if not np.all(difference <= self._rtol * scale):
                at = tuple(int(i) for i in np.unravel_index(np.argmax(difference), a.shape))
                which = f" {place}" if len(y) > 1 else ""
                raise AssertionError(
                    f"{self.who}: y{which} changes when it is differentiated: at "
                    f"{list(at)} {float(b[at])!r}, else {float(a[at])!r}"
                )

    def _check_finite(self, got: Point) -> None:
        for name, leaf in got.items():
            wrong = np.argwhere(~np.isfinite(wide(leaf)))
            if len(wrong):
                at = tuple(map(int, wrong[0]))
                raise AssertionError(
                    f"{self.who}: d_{name} is {float(leaf[at])!r} at {list(at)}, while y is finite "
                    f"and {name} is {float(self.point[name][at])!r} there"
                )

    def _check_vmap(
        self, pulled: Callable[..., Any], points: Sequence[Point], cts: Sequence[Outputs]
    ) -> None:
        """Raise unless three at once have the same cotangents as each alone."""
        stacked, of_cts = _stack(points), _stack(cts)
        if not _traces(jax.vmap(self._output), stacked):
            return
        both = jax.jit(jax.vmap(self._pulled))(stacked, of_cts)[1]
        self._compare_each(pulled, points, cts, both, "itself under vmap")
        at_one = jax.jit(jax.vmap(self._pulled, (None, 0)))(points[1], of_cts)[1]
        self._compare_each(pulled, [points[1]] * 3, cts, at_one, "itself under vmap of ct")

    def _compare_each(
        self,
        pulled: Callable[..., Any],
        points: Sequence[Point],
        cts: Sequence[Outputs],
        batched: Point,
        words: str,
    ) -> None:
        for index, (point, ct) in enumerate(zip(points, cts, strict=True)):
            alone = jax.tree.map(lambda leaf, index=index: leaf[index], batched)
            self._compare(pulled(point, ct)[1], alone, f"{words}, {EACH[index]}", ct)

    def _check_fun(self, pulled: Callable[..., Any], point: Point, ct: Outputs) -> None:
        """Raise unless autodiff of the undecorated function returns the same."""
        if self.rule is None:
            return
        undecorated = functools.partial(_floats_of, self.rule.fun, self.arguments)

        def by_autodiff(point: Point, ct: Outputs) -> Point:
            return jax.vjp(undecorated, point)[1](ct)[0]

        if not _traces(by_autodiff, point, ct):  # not differentiable, such as a while loop
            return
        expected = jax.jit(by_autodiff)(point, ct)
        got = pulled(point, ct)[1]
        finite = {name for name, leaf in expected.items() if np.isfinite(wide(leaf)).all()}
        got, expected = ({name: d[name] for name in finite} for d in (got, expected))
        self._compare(got, expected, "jax.vjp of the undecorated function", ct)

    def _check_differences(
        self, output: Fn, point: Point, d_point: Point, ct: Outputs, kinks: bool
    ) -> None:
        check_differences(
            self.who,
            "the function",
            GIVER,
            output,
            point,
            normal(self._rng, point),
            dict(jax.tree.leaves_with_path(d_point)),
            ct,
            self._exactness.differences,
            kinks,
        )

    def _compare(self, got: Point, expected: Point, oracle: str, ct: Outputs) -> None:
        compare(self.who, got, expected, oracle, self._rtol, ct, giver=GIVER)


def name_of(f: Fn) -> str:
    """Return the name of a function in messages."""
    return getattr(f, "__name__", None) or repr(f)


def _rule_of(f: Fn) -> Rule | None:
    """Return the custom rule that f is, or that ``jax.jit`` wrapped to make f; None without one."""
    for each in (f, getattr(f, "__wrapped__", None)):
        if isinstance(each, jax.custom_vjp | jax.custom_jvp):
            return each
    return None


def _floats_of(f: Fn, arguments: Arguments, point: Point) -> Outputs:
    """Return the floating leaves of y.

    Raises:
        TypeError: for a y with complex numbers.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(f(*arguments.at(point)))]
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
        raise TypeError(f"check_vjp: y is {shapes(leaves)}; it takes real floats")
    return [leaf for leaf in leaves if is_floating(leaf)]


def _traces(f: Callable[..., Any], *args: Any) -> bool:
    """Return whether f can be traced with these arguments."""
    try:
        jax.eval_shape(f, *args)
    except Exception:  # f or JAX may raise anything
        return False
    return True


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _one(leaf: PyTree) -> PyTree:
    """Return a cotangent of a leaf of y."""
    leaf = jnp.asarray(leaf)
    if is_floating(leaf):
        return jnp.ones(leaf.shape, leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _zeros_for_none(d_arg: PyTree, arg: PyTree) -> PyTree:
    """Return a cotangent with zeros in place of each None, which JAX reads as zeros."""
    if not any(node is None for node in jax.tree.leaves(d_arg, is_leaf=lambda n: n is None)):
        return d_arg

    def filled(node: PyTree, below: PyTree) -> PyTree:
        return jax.tree.map(_zero, below) if node is None else node

    try:
        return jax.tree.map(filled, d_arg, arg, is_leaf=lambda node: node is None)
    except ValueError:  # another structure, which ``fitted`` reports
        return d_arg


def _zero(leaf: PyTree) -> PyTree:
    return jnp.zeros(leaf.shape, leaf.dtype) if is_floating(leaf) else 0
