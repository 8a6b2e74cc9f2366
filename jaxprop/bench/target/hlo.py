"""The cost of a compiled program, read from its text: cycles, loops and collectives."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
OPCODE = re.compile(r" ([a-z][a-z\-]*)\(")
CALLED = re.compile(
    r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"^[su]\d+\[\]\S* constant\((-?\d+)\)")
OPERANDS = re.compile(r"%([\w.\-]+)")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: the operation, such as fusion, while or dot.
        text: the rest of the line, after the name and "=".
    """

    opcode: str
    text: str

    def called(self, *roles: str) -> list[str]:
        """Return the names of the computations that it calls in these roles."""
        return [name for role, name in CALLED.findall(self.text) if role in roles]

    def branches(self) -> list[str]:
        """Return the names of a conditional's computations."""
        listed = BRANCHES.search(self.text)
        if listed:
            return OPERANDS.findall(listed[1])
        return self.called("true_computation", "false_computation")


class Cost(NamedTuple):
    """The cost of a program by the compiler's own estimate.

    Attributes:
        cycles: the sum over instructions, where a loop counts once per iteration and a conditional
            as its cheapest branch; 0 where the compiler reports none.
        worst_cycles: the same, with the costliest branch.
        collectives: how often each kind of collective is executed in the worst case, by its name.
        open_loops: the number of loops whose iterations the text does not give. They count once.
    """

    cycles: int
    worst_cycles: int
    collectives: dict[str, int]
    open_loops: int


def cost(text: str) -> Cost:
    """Return the cost of a compiled program.

    Args:
        text: the program, as ``compiled.as_text()`` returns it.
    """
    computations, entry = _parsed(text)
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = _sum([of_instruction(each) for each in computations.get(name, [])])
        return known[name]

    def of_instruction(each: Instruction) -> Cost:
        kind = _collective(each, computations)
        found = CYCLES.search(each.text)
        cycles = int(found[1]) if found else 0
        own = Cost(cycles, cycles, {kind: 1} if kind else {}, 0)
        if each.opcode == "while":
            trips = _trips(each, computations)
            inside = _sum([of(name) for name in each.called("body", "condition")])
            return _times(inside, trips or 1, open_loops=trips is None)
        if each.opcode == "conditional":
            branches = [of(name) for name in each.branches()]
            worst = max(branches, key=lambda cost: cost.worst_cycles)
            return worst._replace(cycles=min(cost.cycles for cost in branches))
        if each.opcode == "call" or (each.opcode.endswith("-start") and not kind):
            return _sum([own, *(of(name) for name in each.called("to_apply", "calls"))])
        return own

    return of(entry)


def _sum(costs: list[Cost]) -> Cost:
    collectives: collections.Counter[str] = collections.Counter()
    for each in costs:
        collectives.update(each.collectives)
    return Cost(
        sum(each.cycles for each in costs),
        sum(each.worst_cycles for each in costs),
        dict(collectives),
        sum(each.open_loops for each in costs),
    )


def _times(cost: Cost, trips: int, open_loops: int) -> Cost:
    return Cost(
        trips * cost.cycles,
        trips * cost.worst_cycles,
        {kind: trips * count for kind, count in cost.collectives.items()},
        cost.open_loops + open_loops,
    )


def _parsed(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation by its name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", []
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            inside = computations[head[2]] = []
            entry = head[2] if head[1] else entry
            continue
        found = INSTRUCTION.match(line)
        opcode = found and OPCODE.search(f" {found[1]}")
        if found and opcode:
            inside.append(Instruction(opcode[1], found[1]))
    return computations, entry


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Return how often a loop runs, if known; without a trip count, it is taken to count from 0."""
    known = TRIPS.search(loop.text)
    if known:
        return int(known[1])
    condition = computations.get(loop.called("condition")[0], [])
    bounds = [int(found[1]) for each in condition if (found := CONSTANT.match(each.text))]
    return bounds[0] if len(bounds) == 1 and "direction=LT" in condition[-1].text else None


def _collective(each: Instruction, computations: dict[str, list[Instruction]]) -> str | None:
    """Return the kind of collective, or None; a TPU's reduce-scatter is a fusion, known by name."""
    if each.opcode == "fusion":
        names = each.called("calls")
        if any(name.startswith("all-reduce-scatter") for name in names):
            return "reduce-scatter"
        inner = [one.opcode for name in names for one in computations.get(name, [])]
    else:
        inner = [each.opcode]
    return next(
        (kind for kind in COLLECTIVES for op in inner if op in (kind, f"{kind}-start")), None
    )
