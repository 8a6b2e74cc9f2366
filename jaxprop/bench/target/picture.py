"""The table of ``jaxprop bench --target`` as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {"cycles": "the compiler's estimate of cycles", "live": "memory in use"}
TICKS = (0.03, 0.1, 0.3, 1, 3, 10, 30)


def draw(figures: dict[str, Any]) -> Figure:
    """Draw the ratio hand/auto of each row, for each figure that the target's compiler reports.

    Args:
        figures: what ``bench_target`` returns.
    """
    from matplotlib.figure import Figure

    rows = figures["rows"]
    told = [kind for kind in PANELS if any(row["ratio"][kind] for row in rows.values())]
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots(1, max(len(told), 1), sharey=True, squeeze=False)[0]
    for panel, kind in zip(axes, told, strict=False):
        for at, row in enumerate(rows.values()):
            ratio = row["ratio"][kind]
            if not ratio:
                continue
            panel.barh(at, ratio - 1, left=1, color=_color(ratio), height=0.6)
            text, side = f"{ratio:.2f}", 1 if ratio >= 1 else -1
            panel.annotate(
                text,
                (ratio, at),
                xytext=(4 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7,
            )
        panel.set_xscale("log")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.margins(x=0.2, y=0.01)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"{PANELS[kind]}, hand / auto", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"Compiled for one {figures['device']}, and not run", fontsize=10)
    return figure


def _color(ratio: float) -> str:
    return "tab:red" if ratio > 1.1 else "tab:blue" if ratio < 1 / 1.1 else "tab:gray"
