"""A progress line and pictures of the gradients, shared by the examples."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jaxprop as jp

SHARE = 0.01  # fraction of the run time that measuring gradients may take


def gradients(net: Any, loss: Any, x: Any, target: Any) -> Callable[[Any], tuple[Any, Any]]:
    """Return ``f(params)``, the gradient's norm and the noise scale on these examples."""
    take = jp.quantities(net, loss, grads=jp.Gradient(), noise=jp.NoiseScale())

    @jax.jit
    def measure(params: Any) -> tuple[Any, Any]:
        found = take(params, x, target)
        return optax.tree.norm(found["grads"]), found["noise"]

    return measure


class Watch:
    """A progress line on a terminal: the loss, the speed, and the result of ``measure``.

    Where stdout is not a terminal, there is no progress line, and ``off`` is True.

    Args:
        unit: the name of the unit of progress.
        total: the number of units in the whole run.
        done: the number of units that a resumed run has completed before.
        measure: a function of params that returns the gradient's norm and the noise scale.
    """

    def __init__(self, unit: str, total: int, done: int, measure: Callable[[Any], Any]) -> None:
        columns = (
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} examples/s"),
            TextColumn("gradient {task.fields[norm]:.3f}  noise scale {task.fields[noise]:,.0f}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, disable=not sys.stdout.isatty())
        self.off, self.measure, self.spent = self.progress.disable, measure, None
        self.began = self.last = time.perf_counter()
        nothing = dict.fromkeys(("loss", "speed", "norm", "noise"), float("nan"))
        self.task = self.progress.add_task("train", total=total, completed=done, **nothing)

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def print(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.off:
            print(line, flush=True)
        else:
            self.progress.console.print(line, highlight=False)

    def update(self, done: int, examples: int, loss: Any, params: Any) -> None:
        """Update the progress line.

        Args:
            done: the number of units completed so far.
            examples: the number of examples since the last update.
            loss: their mean loss.
            params: the params to measure.
        """
        if self.off:
            return
        loss, now = float(loss), time.perf_counter()
        self.progress.update(
            self.task, completed=done, loss=loss, speed=examples / (now - self.last)
        )
        if self.spent is None:
            self.measure(params)  # compile it
            self.spent, self.began = 0.0, time.perf_counter()
        elif self.spent <= SHARE * (now - self.began):
            start = time.perf_counter()
            norm, noise = map(float, self.measure(params))
            self.spent += time.perf_counter() - start
            self.progress.update(self.task, norm=norm, noise=noise)
        self.last = time.perf_counter()


def draw(
    net: Any, loss: Any, params: Any, x: Any, target: Any, seen: Any, unit: str, path: Path
) -> None:
    """Save pictures of the gradients next to ``path``.

    Their stems end in -norms (per-example gradient norms), -gram (cosines between per-example
    gradients) and -scales (the rms of cotangents and gradients over training).

    Args:
        net: the network.
        loss: the loss.
        params: the params after training.
        x: the inputs.
        target: their targets.
        seen: pairs of a time in the run and the ``jp.explain`` of that time.
        unit: the unit of those times.
        path: the path whose stem is extended.
    """
    from jaxprop import plot

    sq_norms = jp.per_example_sq_norms(net, loss)(params, x, target)
    inner = jp.gram(net, loss)(params, x, target)
    figures = {
        "norms": plot.norms(sq_norms),
        "gram": plot.gram(inner, target if target.ndim == 1 else None),
    }
    if seen:  # empty for a run that was resumed at its end
        times, explanations = zip(*seen, strict=True)
        figures["scales"] = plot.scales(explanations, times, unit)
    for name, figure in figures.items():
        figure.savefig(path.with_stem(f"{path.stem}-{name}"))
    print(f"gradients in {path.with_stem(path.stem + '-*')}")
