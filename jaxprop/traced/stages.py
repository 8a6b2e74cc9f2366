"""A function's program cut where a scan goes through layers of params, each walked by itself.

A stage is a run of equations, or such a scan. What one hands to another is data in slots: those of
x first, and those of y from -1 down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from jaxprop.traced.equations import Program, Scan, scan_of

STAYS = frozenset(("convert_element_type", "copy", "copy_p"))


class Straight(NamedTuple):
    """A run of equations, walked back through at once.

    Attributes:
        program: takes the params that are learned, the others, and data.
        ins: the slots of the data.
        outs: those of the outputs.
    """

    program: Program
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class Layers(NamedTuple):
    """A scan through layers of params, walked layer by layer.

    Attributes:
        body: takes params that are learned, what is fixed (constants, then of a layer), and data:
            constants, carried, of a layer.
        before: takes all params, and gives the stacks of those that are learned, the constants that
            are fixed, the stacks that are fixed, and what is fixed where the scan starts.
        flow: what comes in and goes out.
    """

    body: Program
    before: Program
    flow: Flow


class Flow(NamedTuple):
    """What comes into a scan through layers, and goes out.

    Attributes:
        learned: the number of each param that is learned.
        fixed: how many of the constants are fixed.
        fixed_stacks: how many of the stacks are fixed.
        consts: the slots of the constants that are data.
        carry: those of what is carried; None for what is fixed where the scan starts.
        stacks: those of the stacks that are data.
        outs: those of the outputs; None for one that is not used.
        options: how the scan runs.
    """

    learned: tuple[int, ...]
    fixed: int
    fixed_stacks: int
    consts: tuple[int, ...]
    carry: tuple[int | None, ...]
    stacks: tuple[int, ...]
    outs: tuple[int | None, ...]
    options: tuple[tuple[str, Any], ...]


def stages_of(
    program: Program,
    learned: frozenset[int],
    params: int,
    modules: Sequence[frozenset[int]] | None,
) -> tuple[Straight | Layers, ...]:
    """Return the stages of a program, the last of which gives its outputs.

    Args:
        program: takes params, and data.
        learned: the numbers of the params that are learned.
        params: how many params there are.
        modules: the numbers of the params of each module. A scan is a stage if it goes through
            whole modules, and nothing else is done with their params. None for a single stage.
    """
    return _Cut(program, learned, params, modules).stages()


class _Cut:
    def __init__(
        self,
        program: Program,
        learned: frozenset[int],
        params: int,
        modules: Sequence[frozenset[int]] | None,
    ) -> None:
        jaxpr = program.jaxpr
        self._program, self._modules = program, modules
        self._params, self._xs = jaxpr.invars[:params], jaxpr.invars[params:]
        self._learned = [self._params[index] for index in sorted(learned)]
        self._unlearned = [var for var in self._params if var not in set(self._learned)]
        self._moving = moving_in(program, self._xs)
        self._of_learned = moving_in(program, self._learned)
        self._makers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
        self._readers: dict[Any, list[JaxprEqn | None]] = {}
        for equation in (*jaxpr.eqns, None):
            for var in variables(jaxpr.outvars if equation is None else equation.invars):
                self._readers.setdefault(var, []).append(equation)
        self._slots: dict[Any, int] = {var: slot for slot, var in enumerate(self._xs)}

    def stages(self) -> tuple[Straight | Layers, ...]:
        equations = self._program.jaxpr.eqns
        stages: list[Straight | Layers] = []
        start = 0
        for number, equation in enumerate(equations):
            layers = self._layers(equation)
            if layers is None:
                continue
            stages += self._straight(start, number)
            stages.append(layers)
            start = number + 1
        return (*stages, *self._straight(start, None))

    def _straight(self, start: int, stop: int | None) -> Iterator[Straight]:
        """Yield the stage of the equations from one to another, if anything is made of data there.

        What is made of params alone is made anew in each stage that needs it.
        """
        jaxpr = self._program.jaxpr
        if stop is None:
            outs: list[Any] = list(jaxpr.outvars)
        else:
            made = (var for equation in jaxpr.eqns[start:stop] for var in equation.outvars)
            later = set(variables(jaxpr.outvars))
            for equation in jaxpr.eqns[stop:]:
                later.update(variables(equation.invars))
            outs = [var for var in made if var in later and var in self._moving]
            if not outs:
                return
        before = {var for equation in jaxpr.eqns[:start] for var in equation.outvars} & self._moving
        effects = [equation for equation in jaxpr.eqns[start:stop] if equation.effects]
        needed, ins = self._needed(outs, before.union(self._xs), effects)
        ins = sorted(ins, key=self._slot)
        program = self._program.part([*self._learned, *self._unlearned, *ins], outs, needed)
        last = stop is None
        slots = [~index if last else self._slot(var) for index, var in enumerate(outs)]
        yield Straight(program, tuple(map(self._slot, ins)), tuple(slots))

    def _needed(
        self, outs: Iterable[Any], given: set[Any], kept: Sequence[JaxprEqn] = ()
    ) -> tuple[list[JaxprEqn], set[Any]]:
        """Return the equations that make outs, and those kept, and what they need of the given."""
        wanted = set(variables(outs))
        needed: list[JaxprEqn] = []
        for equation in reversed(self._program.jaxpr.eqns):
            makes = any(var in wanted and var not in given for var in equation.outvars)
            if makes or any(equation is each for each in kept):
                needed.append(equation)
                wanted.update(variables(equation.invars))
        return needed[::-1], wanted & given

    def _layers(self, equation: JaxprEqn) -> Layers | None:
        """Return the stage of a scan; None for what is none, or one that goes through no layers."""
        if equation.primitive.name != "scan" or equation.effects or self._modules is None:
            return None
        scan = scan_of(equation)
        ends = scan.consts, scan.consts + scan.carry
        params = {
            place: self._stack(equation, place) for place in range(ends[1], len(equation.invars))
        }
        params = {place: var for place, var in params.items() if var is not None}
        learned = {place: var for place, var in params.items() if var in self._learned}
        here = {self._params.index(var) for var in params.values()}
        whole = all(module <= here or not module & here for module in self._modules)
        if not learned or not scan.length or not whole:
            return None
        data = [var in self._moving for var in map(_hashed, equation.invars)]
        for place, var in enumerate(equation.invars):
            if not data[place] and place not in learned and _hashed(var) in self._of_learned:
                return None
        if not self._all_move(equation, scan, data, learned):
            return None
        fixed = [not here and place not in learned for place, here in enumerate(data)]
        carried = range(*ends)
        rest = [place for place in range(len(fixed)) if place not in carried]
        of_scan = [place for place in rest if fixed[place]]
        moving = [place for place in rest if data[place]]
        still = [place for place in carried if not data[place]]
        consts, stacks = ([p for p in moving if p < ends[0]], [p for p in moving if p >= ends[1]])
        invars = scan.body.jaxpr.invars
        order = [*learned, *of_scan, *consts, *carried, *stacks]
        body = scan.body.part(
            [invars[p] for p in order], scan.body.jaxpr.outvars, scan.body.jaxpr.eqns
        )
        values = [equation.invars[place] for place in (*learned, *of_scan, *still)]
        needed, _ = self._needed(values, set(self._params))
        flow = Flow(
            tuple(self._params.index(var) for var in learned.values()),
            sum(place < ends[0] for place in of_scan),
            sum(place >= ends[1] for place in of_scan),
            tuple(self._slot(equation.invars[place]) for place in consts),
            tuple(self._slot(equation.invars[p]) if data[p] else None for p in carried),
            tuple(self._slot(equation.invars[place]) for place in stacks),
            tuple(self._slot(var) if var in self._readers else None for var in equation.outvars),
            tuple(scan.options.items()),
        )
        return Layers(body, self._program.part(self._params, values, needed), flow)

    def _stack(self, equation: JaxprEqn, place: int) -> Any | None:
        """Return the param whose layers come into a scan at a place, and go nowhere else."""
        var = equation.invars[place]
        if isinstance(var, Literal):
            return None
        while len(self._readers[var]) == 1:
            if var in self._params:
                return var
            maker = self._makers.get(var)
            if maker is None or maker.primitive.name not in STAYS:
                return None
            (var,) = maker.invars
            if isinstance(var, Literal):
                return None
        return None

    def _all_move(
        self, equation: JaxprEqn, scan: Scan, data: Sequence[bool], learned: Iterable[int]
    ) -> bool:
        """Return whether all that is carried, and all outputs that are used, are made of data."""
        invars = scan.body.jaxpr.invars
        moving = {var for place, var in enumerate(invars) if data[place] or place in learned}
        carried = invars[scan.consts : scan.consts + scan.carry]
        outs = scan.body.jaxpr.outvars
        while True:
            found = moving_in(scan.body, list(moving))
            more = {
                var for var, out in zip(carried, outs, strict=False) if _hashed(out) in found
            } - moving
            if not more:
                break
            moving |= more
        used = [
            out for out, var in zip(outs, equation.outvars, strict=True) if var in self._readers
        ]
        return all(var in moving for var in carried) and all(_hashed(out) in found for out in used)

    def _slot(self, var: Any) -> int:
        return self._slots.setdefault(var, len(self._slots))


def moving_in(program: Program, given: Sequence[Any]) -> set[Any]:
    """Return the variables that are made of those that are given, and these."""
    moving = set(given)
    for equation in program.jaxpr.eqns:
        if any(var in moving for var in variables(equation.invars)):
            moving.update(equation.outvars)
    return moving


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Return the variables among the inputs of an equation, without the numbers."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _hashed(atom: Any) -> Any:
    """Return a variable; None for a number, which cannot be looked up."""
    return None if isinstance(atom, Literal) else atom
