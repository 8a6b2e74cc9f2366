"""The command line: ``jaxprop walkthrough`` and ``jaxprop bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxprop.bench import (
    TARGETS,
    BenchError,
    bench,
    bench_growth,
    bench_peers,
    bench_target,
    regressions,
)
from jaxprop.walkthrough import text
from jaxprop.walkthrough.config import WORKED_EXAMPLE, Config, ConfigError, dump, load
from jaxprop.walkthrough.descent import walkthrough
from jaxprop.walkthrough.page import STEPS, page
from jaxprop.walkthrough.sections import ALL, READABLE
from jaxprop.walkthrough.words import LANGUAGES

MOST_STEPS = 10**9


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the command's name; those of the process by default. Without a
            command, the walkthrough runs.

    Returns:
        0, or 1 for a regression of ``bench``, or 2 for a mistake on the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["walkthrough", *argv]
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ConfigError, BenchError) as error:
        print(f"jaxprop: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxprop",
        description="Backpropagation for JAX with the backward pass in the open. Without a command "
        "it is the walkthrough, whose options jaxprop walkthrough --help lists.",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    walk = commands.add_parser(
        "walkthrough",
        help="one step of gradient descent with every number of the chain rule (the default)",
        description="One step of gradient descent on the classic 2-2-2 network, or on yours, with "
        "every number of the chain rule, by hand and by jax.grad.",
    )
    walk.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help=f"descend N steps (default: 1; {STEPS} with --html)",
    )
    walk.add_argument("--weight", metavar="NAME", help="show this weight's chain only, such as w3")
    walk.add_argument(
        "--all",
        action="store_true",
        help="print all of a large network, not the first of everything",
    )
    walk.add_argument("--config", metavar="FILE", help="a network in TOML (see --print-config)")
    output = walk.add_mutually_exclusive_group()
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document (its keys: pydoc jaxprop.walkthrough.document)",
    )
    output.add_argument("--print-config", action="store_true", help="print the network as TOML")
    output.add_argument(
        "--html", metavar="FILE", help="write a page to step through (needs jinja2)"
    )
    walk.add_argument(
        "--lang",
        choices=LANGUAGES,
        default="en",
        help="the language of the text (default: %(default)s)",
    )
    walk.set_defaults(run=_walkthrough)
    measure = commands.add_parser(
        "bench",
        help="measure the hand-written chain against jax.value_and_grad",
        description="Run time, trace time, compile time and temporary memory of the hand-written "
        "chain against jax.value_and_grad of the same loss, alternately, in one process, on the "
        "device that JAX finds.",
    )
    measure.add_argument(
        "--only",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="only the rows whose name contains one of these",
    )
    measure.add_argument("--quick", action="store_true", help="fewer samples")
    measure.add_argument(
        "--large", action="store_true", help="rows for an accelerator too, such as gpt2-small"
    )
    beside = measure.add_mutually_exclusive_group()
    beside.add_argument(
        "--target",
        choices=TARGETS,
        help="compile for this device instead, which need not be there: cycles and memory",
    )
    beside.add_argument(
        "--peers",
        action="store_true",
        help="measure against other libraries, as far as they are installed (the peers extra)",
    )
    beside.add_argument(
        "--growth", action="store_true", help="measure how time and memory grow with the sizes"
    )
    measure.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    measure.add_argument(
        "--plot", metavar="FILE", help="draw --peers, --growth or --target (needs matplotlib)"
    )
    measure.add_argument(
        "--baseline",
        metavar="FILE",
        help="compare with the figures in FILE and exit 1 if a ratio is more than a tenth worse",
    )
    measure.set_defaults(run=_bench)
    return parser


def _walkthrough(args: argparse.Namespace) -> int:
    config = WORKED_EXAMPLE if args.config is None else load(args.config)
    if args.print_config:
        print(dump(config), end="")
        return 0
    steps = args.steps or 1
    if args.weight is not None and steps > 1:
        raise ConfigError("--weight shows the first step: leave out --steps")
    if args.html is not None:
        return _html(config, args)
    walk = walkthrough(config, steps)
    names = [weight.name for weight in walk.chains()]
    if args.weight is not None and args.weight not in names:
        known = f"{names[0]} to {names[-1]}" if len(names) > 8 else ", ".join(names)
        raise ConfigError(f"--weight {args.weight}: no such weight; there are {known}")
    if args.json:
        print(json.dumps(walk.document(args.weight), indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    if args.weight is not None:
        text.show_weight(walk, args.weight, console, args.lang)
    else:
        text.show(walk, console, args.lang, ALL if args.all else READABLE)
    return 0


def _html(config: Config, args: argparse.Namespace) -> int:
    if args.weight is not None:
        raise ConfigError("--html shows every weight: leave out --weight")
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("--html needs jinja2: pip install 'jaxprop-vjp[html]'")
    try:
        Path(args.html).write_text(page(config, args.steps or STEPS, args.lang), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {args.html}: {(error.strerror or '').lower()}") from error
    return 0


def _bench(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the progress bar is removed
    baseline = None if args.baseline is None else _read_figures(args.baseline)
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path is not None and not Path(path).parent.is_dir():
            raise BenchError(f"--{option} {path}: no such directory")
        if path is not None and Path(path).is_dir():
            raise BenchError(f"--{option} {path}: is a directory")
    figures = _figures(args)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    worse = [] if baseline is None else regressions(figures, baseline)
    for line in worse:
        print(f"worse: {line}")
    if baseline is not None:
        rows = [name for name in figures["rows"] if name in baseline["rows"]]
        if not rows:
            raise BenchError(f"--baseline {args.baseline}: it has none of these rows")
        none = "" if worse else "none "
        print(f"{len(rows)} rows compared with {args.baseline}: {none}worse by more than a tenth")
    return 1 if worse else 0


def _figures(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures that the options ask for, after drawing them if there is a --plot."""
    of = "peers" if args.peers else "growth" if args.growth else "target" if args.target else None
    if of is None and args.plot is not None:
        raise BenchError("--plot draws --peers, --growth or --target: add one of them")
    if of in ("peers", "growth") and args.large:
        raise BenchError("--large is for the rows without --peers and --growth")
    if of == "growth" and args.baseline is not None:
        raise BenchError("--baseline compares ratios, and --growth has none")
    if of == "target" and args.quick:
        raise BenchError("--quick takes fewer samples, and with --target nothing is run")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'jaxprop-vjp[plot]'")
    if of == "target":
        jax.config.update("jax_platforms", "cpu")  # the compilers need no device, nor its driver
        figures = bench_target(args.target, only=args.only, large=args.large)
    elif of == "peers":
        figures = bench_peers(only=args.only, quick=args.quick)
    elif of == "growth":
        figures = bench_growth(only=args.only, quick=args.quick)
    else:
        figures = bench(only=args.only, quick=args.quick, large=args.large)
    if args.plot is not None:
        draw = importlib.import_module(f"jaxprop.bench.{of}.picture").draw
        draw(figures).savefig(args.plot, dpi=150)
    return figures


def _read_figures(path: str) -> dict[str, Any]:
    """Return the figures in a file that ``jaxprop bench --json`` wrote."""
    try:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"--baseline {path}: {(error.strerror or '').lower()}") from error
    except ValueError as error:
        raise BenchError(f"--baseline {path}: not JSON: {error}") from error
    try:
        regressions(figures, figures)
    except (AttributeError, KeyError, TypeError):
        raise BenchError(f"--baseline {path}: not written by jaxprop bench --json") from None
    return figures


def _positive(text: str) -> int:
    """Parse a number of steps."""
    if not text.isdecimal() or not 1 <= int(text) <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MOST_STEPS}, not {text!r}")
    return int(text)


class Version(argparse.Action):
    """The option --version, which looks the installed version up only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        try:
            version = importlib.metadata.version("jaxprop-vjp")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"jaxprop {version}")
        parser.exit()
