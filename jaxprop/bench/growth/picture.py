"""The picture of ``jaxprop bench --growth``, with a small panel for each row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4


def draw(figures: dict[str, Any]) -> Figure:
    """Draw time and memory against the size, relative to their values at the smallest.

    Args:
        figures: what ``bench_growth`` returns.
    """
    from matplotlib.figure import Figure

    rows = figures["rows"]
    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.7 * columns, 2.3 * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for panel, (name, row) in zip(axes, rows.items(), strict=False):
        sizes, (first, *_, last) = row["sizes"], row["sizes"]
        medians = [spread["median"] for spread in row["run_s"]]
        curves = (
            ("time", medians, row["time_exponent"], "tab:blue", "o"),
            ("memory", row["temp_bytes"], row["memory_exponent"], "tab:orange", "s"),
        )
        for label, values, found, color, marker in curves:
            if found is None:
                continue
            relative = [value / values[0] for value in values]
            text = f"{label} {found['k']:.2f}"
            panel.plot(sizes, relative, color=color, marker=marker, markersize=3.5, label=text)
        way = -1 if row["along"] == "devices" else 1
        slope = [1, (last / first) ** way]
        panel.plot([first, last], slope, color="grey", linestyle=":", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(name, fontsize=8.5)
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(rows) :]:
        panel.set_visible(False)
    figure.supylabel("times what it is at the smallest size", fontsize=9)
    figure.suptitle("Growth, with exponents; dotted: in proportion to the size", fontsize=10)
    return figure
