"""An optax update taken apart, so that each param can be updated as soon as its gradient exists.

``optimizer.update`` takes all gradients and all state at once. Traced, it is a list of equations,
most of which belong to one param: they depend on its gradient and on no other. ``Leafwise`` sorts
them, and with them the optimizer's state, by that param; what depends on none (a step count, a
schedule) is shared. Whatever optax composes is taken apart so, masks and partitions too, and an
update that looks across params is found out, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxprop.seats import Attached, is_attached

SHARED, ACROSS = -1, -2  # the owner of what belongs to no param, and of what looks at several
ENTRYWISE = frozenset(
    """abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem
    round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)


class Leafwise:
    """The update of each param by itself.

    ``apply(grads, state, params, seen, value_fn)`` gives new (params, state); ``seen`` is what it
    may know of the whole batch, such as the loss. Raises ``ValueError`` where the update of a param
    depends on another's gradient or state.
    """

    def __init__(
        self, apply: Callable[..., tuple[Any, Any]], params: Any, state: Any, seen: Any
    ) -> None:
        def update(grads: Any, state: Any, params: Any, seen: Any) -> tuple[Any, Any]:
            return apply(grads, state, params, seen, _no_value_fn)

        with jax.disable_jit():  # all equations side by side, none inside another
            closed = jax.make_jaxpr(update)(params, state, params, seen)
        self._params, self._of_params = jax.tree.flatten(params)
        self._state, self._of_state = jax.tree.flatten(state)
        self._apart = apart = Apart(closed.jaxpr, params, state)
        given = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        given |= zip(apart.state_in, self._state, strict=True)
        given |= zip(apart.seen_in, jax.tree.leaves(seen), strict=True)
        self._shared = apart.run(SHARED, given.__getitem__) | given

    def attached(self) -> Any:
        """params, each with the part of the state that belongs to it."""
        leaves = [
            Attached(param, tuple(self._state[slot] for slot in slots), index)
            for index, (param, slots) in enumerate(
                zip(self._params, self._apart.slots, strict=True)
            )
        ]
        return jax.tree.unflatten(self._of_params, leaves)

    def updated(self, seat: Any, grads: Any) -> Any:
        """What stands in a layer's seat, with each ``Attached`` param updated by its gradient."""
        each = iter(jax.tree.leaves(grads))
        return jax.tree.map(
            lambda leaf: self._updated(leaf, next(each)) if is_attached(leaf) else leaf,
            seat,
            is_leaf=is_attached,
        )

    def results(self, seats: Any) -> tuple[Any, Any]:
        """``(params, state)``, when all params were updated where they stand."""
        leaves = filter(is_attached, jax.tree.leaves(seats, is_leaf=is_attached))
        params = sorted(leaves, key=lambda leaf: leaf.index)
        state = [
            _value(out, self._shared.__getitem__) if self._apart.owner(out) == SHARED else None
            for out in self._apart.state_out
        ]
        for leaf in params:
            for slot, value in zip(self._apart.slots[leaf.index], leaf.state, strict=True):
                state[slot] = value
        new_params = jax.tree.unflatten(self._of_params, [leaf.param for leaf in params])
        return new_params, jax.tree.unflatten(self._of_state, state)

    def _updated(self, leaf: Attached, grad: Array) -> Attached:
        """Of a whole param, or of one layer's part where it is a stack of a ``repeat``."""
        apart, index = self._apart, leaf.index
        stacked = self._params[index].ndim - grad.ndim
        if stacked:
            apart.hold_entrywise(index)
        slots = apart.slots[index]
        given = {apart.grads_in[index]: grad, apart.params_in[index]: leaf.param}
        given |= zip((apart.state_in[slot] for slot in slots), leaf.state, strict=True)

        def read(var: Any) -> Any:
            if var in given:
                return given[var]
            value = self._shared[var]
            return value[(0,) * stacked] if stacked and value.ndim else value  # its layers' is one

        given |= apart.run(index, read)
        outs = apart.params_out[index], *(apart.state_out[slot] for slot in slots)
        param, *state = (_value(out, read) for out in outs)
        return Attached(param, tuple(state), index)


class Apart:
    """The equations of (grads, state, params, seen) -> (params, state), by their owner."""

    def __init__(self, jaxpr: Jaxpr, params: Any, state: Any) -> None:
        self._names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        self._states = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
        count, slots = len(self._names), len(self._states)
        self.grads_in, inputs = jaxpr.invars[:count], jaxpr.invars[count:]
        self.state_in, inputs = inputs[:slots], inputs[slots:]
        self.params_in, self.seen_in = inputs[:count], inputs[count:]
        self.params_out, self.state_out = jaxpr.outvars[:count], jaxpr.outvars[count:]
        needed = _needed(jaxpr)
        self.owner = self._owners(needed)
        self._hold_apart(needed)
        self._jaxpr = jaxpr
        self._equations: dict[int, list[JaxprEqn]] = {i: [] for i in (SHARED, *range(count))}
        for equation in needed:
            self._equations[_owner_of(equation, self.owner)].append(equation)
        self.slots: list[list[int]] = [[] for _ in range(count)]
        for slot, out in enumerate(self.state_out):
            if self.owner(out) != SHARED:
                self.slots[self.owner(out)].append(slot)

    def run(self, owner: int, read: Callable[[Any], Any]) -> dict[Any, Any]:
        """The value of every variable that the owner's equations define."""
        equations = self._equations[owner]
        defined = dict.fromkeys(out for equation in equations for out in equation.outvars)
        wanted = dict.fromkeys(
            var
            for equation in equations
            for var in equation.invars
            if not isinstance(var, Literal) and var not in defined
        )
        part = self._jaxpr.replace(
            constvars=[], invars=list(wanted), outvars=list(defined), eqns=equations
        )
        values = jaxpr_as_fun(ClosedJaxpr(part, []))(*map(read, wanted))
        return dict(zip(defined, values, strict=True))

    def hold_entrywise(self, index: int) -> None:
        """Raise unless each entry of the param is updated by itself, and so a layer of a stack."""
        shape = _shape(self.params_in[index])
        uniform = _uniform(self._equations[SHARED])

        def fits(var: Any) -> bool:
            if self.owner(var) == SHARED:
                return not _shape(var) or var in uniform
            return _shape(var) == shape

        def refuse(why: str) -> None:
            raise ValueError(
                f"fused: the update of params{self._names[index]}, which repeat stacks, {why}; use "
                "fused=False"
            )

        for equation in self._equations[index]:
            if equation.primitive.name not in ENTRYWISE:
                refuse(
                    f"looks at more than one entry at a time ({equation.primitive}), so that no "
                    "layer can be updated alone"
                )
            if not all(map(fits, equation.invars)):
                refuse(
                    f"uses more than one entry, or number, at a time ({equation.primitive}), so "
                    "that no layer can be updated alone"
                )
        slots = self.slots[index]
        before = self.params_in[index], *(self.state_in[slot] for slot in slots)
        after = self.params_out[index], *(self.state_out[slot] for slot in slots)
        for old, new in zip(before, after, strict=True):
            if not fits(new) or _dtype(new) != _dtype(old):
                refuse(f"makes {_dtype(new)}{_shape(new)} of {_dtype(old)}{_shape(old)}")

    def _owners(self, equations: list[JaxprEqn]) -> Callable[[Any], int]:
        """The owner of each variable: the one param whose gradient, state or value it depends on.

        State belongs to the param that its next value depends on. That may make more depend on
        it, so the search is repeated until it finds nothing new.
        """
        start = {var: index for index, var in enumerate(self.grads_in)}
        start |= {var: index for index, var in enumerate(self.params_in)}
        while True:
            found = dict(start)

            def owner(var: Any, found: dict[Any, int] = found) -> int:
                return SHARED if isinstance(var, Literal) else found.get(var, SHARED)

            for equation in equations:
                found |= dict.fromkeys(equation.outvars, _owner_of(equation, owner))
            before = dict(start)
            start |= zip(self.state_in, map(owner, self.state_out), strict=True)
            if start == before:
                return owner

    def _hold_apart(self, equations: list[JaxprEqn]) -> None:
        for index, out in enumerate(self.params_out):
            if self.owner(out) not in (index, SHARED):
                first = next(e for e in equations if _owner_of(e, self.owner) == ACROSS)
                raise ValueError(
                    "fused: each param is updated alone, but this optimizer's update of "
                    f"params{self._names[index]} looks at others too ({first.primitive}); use "
                    "fused=False, or for clipping by the global norm max_norm in place of "
                    "optax.clip_by_global_norm"
                )
        for name, out in zip(self._states, self.state_out, strict=True):
            if self.owner(out) == ACROSS:
                raise ValueError(
                    "fused: each param is updated alone, but this optimizer's "
                    f"state{name} looks at several; use fused=False"
                )
        for equation in equations:
            if equation.effects and _owner_of(equation, self.owner) == ACROSS:
                raise ValueError(
                    f"fused: each param is updated alone, but {equation.primitive} in this "
                    "optimizer looks at several; use fused=False"
                )


def _owner_of(equation: JaxprEqn, owner: Callable[[Any], int]) -> int:
    owners = set(map(owner, equation.invars)) - {SHARED}
    return ACROSS if len(owners) > 1 else max(owners, default=SHARED)


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that a result depends on, and those that print, say."""
    wanted, kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or wanted.intersection(equation.outvars):
            wanted |= {var for var in equation.invars if not isinstance(var, Literal)}
            kept.append(equation)
    return kept[::-1]


def _uniform(equations: list[JaxprEqn]) -> set[Any]:
    """Those of the results that are one scalar, spread out."""
    uniform: set[Any] = set()
    for equation in equations:
        spread = equation.primitive.name in ENTRYWISE | {"broadcast_in_dim"}
        scalars = (not _shape(var) or var in uniform for var in equation.invars)
        if spread and all(scalars):
            uniform.update(equation.outvars)
    return uniform


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _dtype(var: Any) -> Any:
    return var.aval.dtype


def _value(var: Any, read: Callable[[Any], Any]) -> Any:
    return var.val if isinstance(var, Literal) else read(var)


def _no_value_fn(params: Any) -> Any:
    raise ValueError(
        "fused: this optimizer asks for the loss as a function of all params; use fused=False"
    )
