"""A function's program, cut into stages at each scan over layers of params.

A stage is a run of equations, or such a scan, and stages are walked one by one. They pass data on
in numbered slots: the leaves of x have the first ones, and the leaves of y those from -1 down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from jaxprop.core.arrays import is_floating
from jaxprop.traced.equations import Program, Scan, scan_of, struct, variables

STAYS = frozenset(("convert_element_type", "copy"))


class Straight(NamedTuple):
    """A run of equations, walked back as a whole.

    Attributes:
        program: a program of the learned params, the other params, and data.
        ins: the slots of the data.
        outs: the slots of the outputs.
    """

    program: Program
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class Layers(NamedTuple):
    """A scan over layers of params, walked layer by layer.

    Attributes:
        body: a program of one layer's learned params, of fixed constants and the layer's fixed
            values, and of data: constants, carried values and the layer's values.
        before: a program of all params that returns the stacks of learned params, the fixed
            constants, the fixed stacks, and the fixed initial values of the carry.
        flow: the inputs and outputs.
    """

    body: Program
    before: Program
    flow: Flow


class Flow(NamedTuple):
    """The inputs and outputs of a scan over layers.

    Attributes:
        learned: the number of each learned param.
        fixed: how many of the constants are fixed.
        fixed_stacks: how many of the stacks are fixed.
        consts: the slots of the constants that are data.
        carry: the slots of the carried values; None for one whose initial value is fixed.
        stacks: the slots of the stacks that are data.
        outs: the slots of the outputs; None for one that is not used.
        options: the options of the scan.
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
    """Return the stages of a program, the last of which computes its outputs.

    Args:
        program: a program of params, and then data.
        learned: the numbers of the learned params.
        params: the number of params.
        modules: the numbers of the params of each module. A scan is a stage if it iterates over
            whole modules whose params have no other use. None for a single stage.
    """
    return _Cut(_live(program), learned, params, modules).stages()


def _live(program: Program) -> Program:
    """Return the program without the equations that nothing needs."""
    wanted = set(variables(program.jaxpr.outvars))
    live: list[JaxprEqn] = []
    for equation in reversed(program.jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            live.append(equation)
            wanted.update(variables(equation.invars))
    return program.part(program.jaxpr.invars, program.jaxpr.outvars, live[::-1])


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
        self._numbers = {var: number for number, var in enumerate(self._params)}
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
        """Yield the stage of the equations from start to stop, if they make anything of data.

        What is made of params alone is computed again in each stage that needs it.
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
        """Return the kept equations and those that make outs, and the given variables they need."""
        wanted = set(variables(outs))
        needed: list[JaxprEqn] = []
        for equation in reversed(self._program.jaxpr.eqns):
            makes = any(var in wanted and var not in given for var in equation.outvars)
            if makes or any(equation is each for each in kept):
                needed.append(equation)
                wanted.update(variables(equation.invars))
        return needed[::-1], wanted & given

    def _layers(self, equation: JaxprEqn) -> Layers | None:
        """Return the stage of a scan over layers; None for another scan or equation."""
        if equation.primitive.name != "scan" or equation.effects or self._modules is None:
            return None
        scan, atoms = scan_of(equation), list(map(_hashed, equation.invars))
        learned = self._stacks(scan, atoms)
        data = [place for place, atom in enumerate(atoms) if atom in self._moving]
        others = {atom for place, atom in enumerate(atoms) if place not in (*learned, *data)}
        if not learned or others & self._of_learned or not scan.length:
            return None
        if not self._all_move(equation, scan, [*learned, *data]):
            return None
        fixed = [place for place in range(len(atoms)) if place not in (*learned, *data)]
        consts = [place for place in data if place < scan.carried.start]
        stacks = [place for place in data if place >= scan.carried.stop]
        of_step = [place for place in fixed if place not in scan.carried]
        at_start = [place for place in fixed if place in scan.carried]
        body, order = scan.body.jaxpr, [*learned, *of_step, *consts, *scan.carried, *stacks]
        values = [equation.invars[place] for place in (*learned, *of_step, *at_start)]
        needed, _ = self._needed(values, set(self._params))
        flow = Flow(
            tuple(learned.values()),
            sum(place < scan.carried.start for place in fixed),
            sum(place >= scan.carried.stop for place in fixed),
            tuple(self._slot(atoms[place]) for place in consts),
            tuple(
                None if place in at_start else self._slot(atoms[place]) for place in scan.carried
            ),
            tuple(self._slot(atoms[place]) for place in stacks),
            tuple(self._slot(var) if var in self._readers else None for var in equation.outvars),
            tuple(scan.options.items()),
        )
        return Layers(
            scan.body.part([body.invars[place] for place in order], body.outvars, body.eqns),
            self._program.part(self._params, values, needed),
            flow,
        )

    def _stacks(self, scan: Scan, atoms: Sequence[Any]) -> dict[int, int]:
        """Return, by place, the number of each learned param whose layers a scan iterates over.

        The result is empty if the scan iterates over only some of the params of a module.
        """
        found = {
            place: self._numbers[var]
            for place, atom in enumerate(atoms)
            if place >= scan.carried.stop and (var := self._param(atom)) is not None
        }
        here = set(found.values())
        assert self._modules is not None
        if any(module & here and not module <= here for module in self._modules):
            return {}
        return {
            place: number
            for place, number in found.items()
            if self._params[number] in self._learned
        }

    def _param(self, var: Any) -> Any | None:
        """Return the param that a variable holds, maybe in another dtype, if it is read once."""
        while var is not None and len(self._readers[var]) == 1:
            if var in self._numbers:
                return var
            maker = self._makers.get(var)
            if maker is None or maker.primitive.name not in STAYS or not is_floating(struct(var)):
                return None
            var = _hashed(maker.invars[0])
        return None

    def _all_move(self, equation: JaxprEqn, scan: Scan, given: Sequence[int]) -> bool:
        """Return whether all carried values and all used outputs are made of the given inputs.

        Args:
            equation: the equation of the scan.
            scan: the scan.
            given: the places of learned params and data among its inputs.
        """
        body = scan.body.jaxpr
        moving = {body.invars[place] for place in given}
        carried = [body.invars[place] for place in scan.carried]
        outs = list(map(_hashed, body.outvars))
        while True:
            found = moving_in(scan.body, list(moving))
            more = {var for var, out in zip(carried, outs, strict=False) if out in found} - moving
            if not more:
                break
            moving |= more
        pairs = zip(outs, equation.outvars, strict=True)
        return moving.issuperset(carried) and all(
            out in found for out, var in pairs if var in self._readers
        )

    def _slot(self, var: Any) -> int:
        return self._slots.setdefault(var, len(self._slots))


def moving_in(program: Program, given: Sequence[Any]) -> set[Any]:
    """Return the given variables, and all variables that are made of them."""
    moving = set(given)
    for equation in program.jaxpr.eqns:
        if any(var in moving for var in variables(equation.invars)):
            moving.update(equation.outvars)
    return moving


def _hashed(atom: Any) -> Any:
    """Return a variable; None for a literal, which cannot be looked up."""
    return None if isinstance(atom, Literal) else atom
