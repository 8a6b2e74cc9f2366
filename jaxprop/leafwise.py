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

from jaxprop.layer import Attached, is_attached

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
        self._names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        self._params, self._of_params = jax.tree.flatten(params)
        self._state, self._of_state = jax.tree.flatten(state)
        self._jaxpr = jaxpr = closed.jaxpr
        count, slots = len(self._params), len(self._state)
        self._grads_in, inputs = jaxpr.invars[:count], jaxpr.invars[count:]
        self._state_in, inputs = inputs[:slots], inputs[slots:]
        self._params_in, seen_in = inputs[:count], inputs[count:]
        self._params_out, self._state_out = jaxpr.outvars[:count], jaxpr.outvars[count:]

        equations = _needed(jaxpr)
        self._owner = self._owners(equations)
        self._hold_apart()
        by_owner: dict[int, list[JaxprEqn]] = {index: [] for index in (SHARED, *range(count))}
        for equation in equations:
            by_owner[self._owner(equation.outvars[0])].append(equation)
        self._equations = by_owner
        self._slots = [
            [slot for slot, out in enumerate(self._state_out) if self._owner(out) == index]
            for index in range(count)
        ]
        given = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        given |= zip(self._state_in, self._state, strict=True)
        given |= zip(seen_in, jax.tree.leaves(seen), strict=True)
        self._shared = _run(jaxpr, by_owner[SHARED], given.__getitem__) | given

    def attached(self) -> Any:
        """params, each with the part of the state that belongs to it."""
        leaves = [
            Attached(param, tuple(self._state[slot] for slot in slots), index)
            for index, (param, slots) in enumerate(zip(self._params, self._slots, strict=True))
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
            _value(out, self._shared.__getitem__) if self._owner(out) == SHARED else None
            for out in self._state_out
        ]
        for leaf in params:
            for slot, value in zip(self._slots[leaf.index], leaf.state, strict=True):
                state[slot] = value
        new_params = jax.tree.unflatten(self._of_params, [leaf.param for leaf in params])
        return new_params, jax.tree.unflatten(self._of_state, state)

    def _updated(self, leaf: Attached, grad: Array) -> Attached:
        """Of a whole param, or of one layer's part where it is a stack of a ``repeat``."""
        index = leaf.index
        stacked = self._params[index].ndim - grad.ndim
        if stacked and not self._acts_on_entries(index):
            raise ValueError(
                f"fused: the update of params{self._names[index]}, which repeat stacks, looks at "
                "more than one entry at a time, so that no layer can be updated alone; use "
                "fused=False"
            )
        slots = [self._state_in[slot] for slot in self._slots[index]]
        given = {self._grads_in[index]: grad, self._params_in[index]: leaf.param}
        given |= zip(slots, leaf.state, strict=True)

        def read(var: Any) -> Any:
            if var in given:
                return given[var]
            value = self._shared[var]
            return value[(0,) * stacked] if stacked and value.ndim else value  # its layers' is one

        given |= _run(self._jaxpr, self._equations[index], read)
        outs = [self._state_out[slot] for slot in self._slots[index]]
        param, *state = (_value(out, read) for out in (self._params_out[index], *outs))
        return Attached(param, tuple(state), index)

    def _owners(self, equations: list[JaxprEqn]) -> Callable[[Any], int]:
        """The owner of each variable: the one param whose gradient, state or value it depends on.

        State belongs to the param that its next value depends on. That may make more depend on
        it, so the search is repeated until it finds nothing new.
        """
        start = {var: index for index, var in enumerate(self._grads_in)}
        start |= {var: index for index, var in enumerate(self._params_in)}
        while True:
            found = dict(start)

            def owner(var: Any, found: dict[Any, int] = found) -> int:
                return SHARED if isinstance(var, Literal) else found.get(var, SHARED)

            for equation in equations:
                owners = {owner(var) for var in equation.invars} - {SHARED}
                of = ACROSS if len(owners) > 1 else max(owners, default=SHARED)
                found |= dict.fromkeys(equation.outvars, of)
            before = dict(start)
            start |= zip(self._state_in, map(owner, self._state_out), strict=True)
            if start == before:
                return owner

    def _hold_apart(self) -> None:
        for index, out in enumerate(self._params_out):
            if self._owner(out) not in (index, SHARED):
                raise ValueError(
                    f"fused: each param is updated alone, but this optimizer's update of "
                    f"params{self._names[index]} looks at others too; use fused=False, or for "
                    "clipping by the global norm max_norm in place of optax.clip_by_global_norm"
                )
        for (path, _), out in zip(
            jax.tree.leaves_with_path(jax.tree.unflatten(self._of_state, self._state)),
            self._state_out,
            strict=True,
        ):
            if self._owner(out) == ACROSS:
                raise ValueError(
                    f"fused: each param is updated alone, but this optimizer's "
                    f"state{jax.tree_util.keystr(path)} looks at several; use fused=False"
                )

    def _acts_on_entries(self, index: int) -> bool:
        """Whether each entry of the param is updated by itself, and so each layer of a stack."""
        shape = self._params[index].shape
        uniform = _uniform(self._equations[SHARED])

        def fits(var: Any) -> bool:
            if self._owner(var) == SHARED:
                return not var.aval.shape or var in uniform
            return var.aval.shape == shape

        equations = self._equations[index]
        outs = [self._params_out[index], *(self._state_out[slot] for slot in self._slots[index])]
        return all(map(fits, outs)) and all(
            equation.primitive.name in ENTRYWISE and all(map(fits, equation.invars))
            for equation in equations
        )


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that a result depends on."""
    wanted, kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            wanted |= {var for var in equation.invars if not isinstance(var, Literal)}
            kept.append(equation)
    return kept[::-1]


def _uniform(equations: list[JaxprEqn]) -> set[Any]:
    """Those of the results that are one scalar, spread out."""
    uniform: set[Any] = set()
    for equation in equations:
        spread = equation.primitive.name in ENTRYWISE | {"broadcast_in_dim"}
        if spread and all(not var.aval.shape or var in uniform for var in equation.invars):
            uniform.update(equation.outvars)
    return uniform


def _run(jaxpr: Jaxpr, equations: list[JaxprEqn], read: Callable[[Any], Any]) -> dict[Any, Any]:
    """The value of every variable that these of the jaxpr's equations define."""
    defined = dict.fromkeys(out for equation in equations for out in equation.outvars)
    wanted = dict.fromkeys(
        var
        for equation in equations
        for var in equation.invars
        if not isinstance(var, Literal) and var not in defined
    )
    part = jaxpr.replace(constvars=[], invars=list(wanted), outvars=list(defined), eqns=equations)
    values = jaxpr_as_fun(ClosedJaxpr(part, []))(*map(read, wanted))
    return dict(zip(defined, values, strict=True))


def _value(var: Any, read: Callable[[Any], Any]) -> Any:
    return var.val if isinstance(var, Literal) else read(var)


def _no_value_fn(params: Any) -> Any:
    raise ValueError(
        "fused: this optimizer asks for the loss as a function of all params; use fused=False"
    )
