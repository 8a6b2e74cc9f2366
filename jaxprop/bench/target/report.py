"""The report of ``jaxprop bench --target``: programs that were compiled, and not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxprop.bench.report import chosen, print_footnotes
from jaxprop.bench.target.compiled import Build, built, target_devices
from jaxprop.bench.terminal import BenchError, print_table, progress, table_of, wide_console

HEADINGS = (
    "hand kcycles",
    "auto",
    "cycles",
    "worst",
    "temp MB",
    "temp",
    "live MB",
    "live",
    "loops",
)
EXPLANATION = """\
Compiled for one {device}, and not run. hand: jaxprop; auto: as in jaxprop bench. kcycles: the
compiler's estimate in thousands{none}, a loop by its iterations, of a conditional (a fallback, or
what is done each so many steps) the cheapest branch. cycles, worst, temp, live: ratios hand/auto;
worst of the dearest branches, where it differs; temp MB: the temporary memory; live MB: the most
memory in use at once less arguments and results. loops: how many hide their iterations, and count
once."""
NO_CYCLES = " (none of a GPU)"


def bench_target(
    target: str, only: str | Sequence[str] | None = None, large: bool = False
) -> dict[str, Any]:
    """Compile the rows for a target, print a table, and return the figures.

    Args:
        target: a name that ``target_devices`` knows.
        only: compile only the rows whose name contains this, or one of these.
        large: whether to compile the rows for an accelerator too.

    Returns:
        The figures, ready for JSON: the device, the version of JAX, and what each row costs.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name, if all rows chosen need
            Flax and it is not installed, or if the target's compiler is not installed.
    """
    rows, skipped = chosen(only, large)
    try:
        (device,) = target_devices(target)
    except ImportError as error:
        raise BenchError(f"--target {target}: {error}") from error
    figures: dict[str, Any] = {
        "target": target,
        "device": device.device_kind,
        "jax": jax.__version__,
        "compiled_not_run": True,
        "rows": {},
    }
    table, console = table_of(HEADINGS), wide_console()
    with progress() as bar:
        for name, make in bar.track(rows.items(), description="compiling"):
            row = _figures(*built(make(), device))
            figures["rows"][name] = row
            table.add_row(name, *_cells(row))
            jax.clear_caches()
    none = "" if device.platform == "tpu" else NO_CYCLES
    print_table(console, table, EXPLANATION.format(device=device.device_kind, none=none))
    print_footnotes(console, rows, skipped)
    return figures


def _figures(hand: Build, auto: Build) -> dict[str, Any]:
    """Return the figures of one row."""
    sides = {
        side: {
            "cycles": build.cost.cycles,
            "worst_cycles": build.cost.worst_cycles,
            "temp_bytes": build.temp_bytes,
            "live_bytes": build.live_bytes,
            "collectives": build.cost.collectives,
            "open_loops": build.cost.open_loops,
        }
        for side, build in (("hand", hand), ("auto", auto))
    }
    ratio = {
        "cycles": _ratio(hand.cost.cycles, auto.cost.cycles),
        "worst": _ratio(hand.cost.worst_cycles, auto.cost.worst_cycles),
        "temp": _ratio(hand.temp_bytes, auto.temp_bytes),
        "live": _ratio(hand.live_bytes, auto.live_bytes),
    }
    return {**sides, "ratio": ratio}


def _ratio(hand: int, auto: int) -> float | None:
    return hand / auto if auto else None


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as the cells of the table."""
    hand, auto, ratio = row["hand"], row["auto"], row["ratio"]

    def said(of: str) -> str:
        return "-" if ratio[of] is None else f"{ratio[of]:.2f}"

    cycles = [f"{side['cycles'] / 1e3:.0f}" if side["cycles"] else "-" for side in (hand, auto)]
    loops = hand["open_loops"] + auto["open_loops"]
    return [
        *cycles,
        said("cycles"),
        said("worst") if said("worst") != said("cycles") else "",
        f"{hand['temp_bytes'] / 1e6:.2f}",
        said("temp"),
        f"{hand['live_bytes'] / 1e6:.2f}",
        said("live"),
        str(loops) if loops else "",
    ]
