"""The table of ``jaxprop bench --peers`` as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {"": "gradient", "norms": "norms", "clipped": "clipped", "parts": "micro-batches"}


def draw(figures: dict[str, Any]) -> Figure:
    """Draw the ratio of each peer's time to ours, in a panel for each network.

    Args:
        figures: what ``bench_peers`` returns.
    """
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(_parts(name)[0] for name in figures["rows"]))
    rows = {
        network: [name for name in figures["rows"] if _parts(name)[0] == network]
        for network in networks
    }
    heights = [len(names) + 1 for names in rows.values()]
    figure = Figure(figsize=(9, 1.2 + 0.27 * sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(networks), 1, sharex=True, squeeze=False, height_ratios=heights
    ).ravel()
    for panel, network in zip(axes, networks, strict=True):
        for at, name in enumerate(rows[network]):
            row = figures["rows"][name]
            low, high = (1 / ratio for ratio in row["run_ratio_quartiles"][::-1])
            times = 1 / row["ratio"]["run"]
            color = "tab:blue" if times >= 1 else "tab:red"
            panel.barh(at, times - 1, left=1, color=color, height=0.6)
            panel.plot([low, high], [at, at], color="black", linewidth=1.5)
            ms = [1e3 * row[side]["run_s"]["median"] for side in ("theirs", "ours")]
            theirs, own = (f"{time:.1f}" if time < 100 else f"{time:.0f}" for time in ms)
            panel.annotate(
                f"{times:.2f}  ({theirs} beside {own} ms)",
                (max(high, 1), at),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        labels = [f"{peer}, {task}" for _, task, peer in map(_parts, rows[network])]
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.margins(x=0.25)
        panel.set_title(network, loc="left", fontsize=10, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes[-1].set_xlabel("their time / ours, with quartiles: right of 1 jaxprop is ahead")
    for panel in axes:
        panel.minorticks_off()
    return figure


def _parts(name: str) -> tuple[str, str, str]:
    """Return the network, the task and the peer of a row's name."""
    work, peer = name.split("/")
    network, _, task = work.partition("-")
    return network, TASKS.get(task, task), peer
