"""Pictures of training: each function returns a matplotlib ``Figure``.

They need the ``plot`` extra: ``pip install 'jaxprop-vjp[plot]'``. A figure opens no window:
``figure.savefig("name.png")`` writes it to a file, and a notebook shows it.

    from jaxprop import plot

    plot.scales(explanations).savefig("scales.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxprop.core.checks import check_number, given, require
from jaxprop.explanation.summary import rms_of_all
from jaxprop.explanation.terms import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["gram", "norms", "scales"]


def scales(
    explanations: Sequence[Explanation], steps: Sequence[float] | None = None, unit: str = "step"
) -> Figure:
    """Draw the rms of each layer's cotangent, and of its gradient, over training.

    Args:
        explanations: results of ``jp.explain`` at points of the training; ``keep=0`` suffices.
        steps: the step of each explanation; 0, 1, 2, … by default.
        unit: the label of the steps, such as "epoch".

    Returns:
        A figure with two axes, the cotangents on the left and the gradients on the right.

    Raises:
        TypeError: for explanations that are not a sequence of ``jp.Explanation``.
        ValueError: for no explanations, for explanations of different nets, or for a different
            number of steps than of explanations.
    """
    if not isinstance(explanations, Iterable):
        raise TypeError(f"scales takes a list of explanations, not {type(explanations).__name__}")
    explanations = list(explanations)
    for index, one in enumerate(explanations):
        require(one, Explanation, f"scales: explanation {index}")
    explanations = jax.device_get(explanations)
    if not explanations:
        raise ValueError("scales: there is no explanation to draw")
    if len({one.net for one in explanations}) > 1:
        raise ValueError("scales: the explanations are of different nets")
    at = range(len(explanations)) if steps is None else _array("scales: steps", steps)
    if len(at) != len(explanations):
        raise ValueError(f"scales: {len(at)} steps for {len(explanations)} explanations")
    runs = [one.runs() for one in explanations]
    names = [f"{name} {terms.layer}".strip() for name, terms in runs[0]]
    each = [[terms.summaries for _, terms in run] for run in runs]
    cts = np.array([[rms_of_all(of.ct) or 0.0 for of in run] for run in each])
    grads = np.array([[rms_of_all(of.grads) or 0.0 for of in run] for run in each])
    figure = _figure(9, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    colours = _colours(len(names))
    for axes, values, title in ((left, cts, "cotangent"), (right, grads, "gradient")):
        for name, column, colour in zip(names, values.T, colours, strict=True):
            if np.any(column > 0):  # a layer without params has no gradient
                axes.plot(at, np.where(column > 0, column, np.nan), color=colour, label=name)
        axes.set(yscale="log", xlabel=unit, ylabel=f"rms of the {title}", title=title.title())
        axes.grid(alpha=0.3)
    if len(names) <= 12:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    else:
        _depth_bar(figure, [left, right], names)
    return figure


def norms(sq_norms: ArrayLike, max_norm: float | None = None) -> Figure:
    """Draw a histogram of the per-example gradient norms.

    Args:
        sq_norms: the squared norms (N,), as ``jp.per_example_sq_norms`` returns them.
        max_norm: a bound on the norm, as ``jp.clipped_grad`` takes it, to mark in the histogram.

    Returns:
        A figure with one axes.

    Raises:
        TypeError: for sq_norms that are not numbers.
        ValueError: for sq_norms of another shape, or negative, or without a finite one.
    """
    squares = _array("norms: squared norms", sq_norms)
    if squares.ndim != 1 or not squares.size:
        raise ValueError(f"norms takes squared norms of shape (N,), not {squares.shape}")
    if np.any(squares < 0):
        raise ValueError(f"norms: a squared norm is not negative, as {squares.min()} is")
    if max_norm is not None:
        check_number("norms: max_norm", max_norm, positive=True)
    values = np.sqrt(squares)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("norms: none of the norms is finite")
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    axes.hist(finite, bins="auto" if np.ptp(finite) else 1, color=BLUE, edgecolor="white")
    axes.axvline(float(np.median(finite)), color="black", ls=":", label="median")
    if max_norm is not None:
        over = np.mean(~(values <= max_norm))
        axes.axvline(max_norm, color=ORANGE, lw=2, label=f"max_norm {max_norm:g}: {over:.0%} above")
    bad = values.size - finite.size
    title = f"Norms of {values.size} examples' gradients"
    axes.set(xlabel="norm", ylabel="examples", title=f"{title}, {bad} not finite" if bad else title)
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    return figure


def gram(inner: ArrayLike, labels: ArrayLike | None = None) -> Figure:
    """Draw the cosines between the gradients of all pairs of examples.

    Args:
        inner: the inner products (N, N), as ``jp.gram`` returns them.
        labels: a label for each example (N,). Examples with the same label are drawn side by side.

    Returns:
        A figure with one axes and a colour bar.

    Raises:
        TypeError: for inner products that are not numbers.
        ValueError: for inner or labels of another shape.
    """
    products = _array("gram: inner products", inner)
    if products.ndim != 2 or products.shape[0] != products.shape[1]:
        raise ValueError(f"gram takes inner products of shape (N, N), not {products.shape}")
    sizes = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products / np.outer(sizes, sizes)  # NaN for a gradient of 0
    figure = _figure(6.0, 5.2)
    axes = figure.subplots()
    ordered = None if labels is None else np.asarray(labels)
    if ordered is not None:
        if ordered.shape != sizes.shape:
            raise ValueError(f"gram: labels of shape {ordered.shape} for {len(sizes)} examples")
        order = np.argsort(ordered, kind="stable")
        cosines, ordered = cosines[np.ix_(order, order)], ordered[order]
    image = axes.imshow(cosines, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xlabel="example", ylabel="example", title="Cosines between examples' gradients")
    if ordered is not None:
        ends = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        bounds = np.concatenate([[0], ends, [len(ordered)]])
        middles = (bounds[:-1] + bounds[1:] - 1) / 2
        for edge in ends:
            axes.axhline(edge - 0.5, color="black", lw=0.6)
            axes.axvline(edge - 0.5, color="black", lw=0.6)
        axes.set(xlabel="label", ylabel="label")
        axes.set_xticks(middles, [str(ordered[int(m)]) for m in middles])
        axes.set_yticks(middles, [str(ordered[int(m)]) for m in middles])
    figure.colorbar(image, label="cosine")
    return figure


BLUE, ORANGE = "#0072B2", "#D55E00"  # from the colour-blind safe palette of Okabe and Ito


def _array(name: str, values: ArrayLike | Sequence[float]) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} are an array of numbers, not {given(values)}") from None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _colours(count: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, count))


def _depth_bar(figure: Figure, axes: list[Axes], names: Sequence[str]) -> None:
    """Add a colour bar in place of a legend: the first layer is dark, the last bright."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ScalarMappable(Normalize(0, len(names)), ListedColormap(_colours(len(names))))
    bar = figure.colorbar(colours, ax=axes, ticks=[0.5, len(names) - 0.5])
    bar.ax.set_yticklabels([names[0], names[-1]])
