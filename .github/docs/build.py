"""Build the site of the documentation, and open it.

    .venv/bin/python .github/docs/build.py

It needs the extra ``[docs]`` and no network. The pages are written to ``build/html`` beside this
file, which git ignores. Warnings are errors. A second build takes what did not change from the
first.
"""

import argparse
import os
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUICK = "--xla_backend_optimization_level=0"  # it compiles far more than it runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the site of the documentation.")
    parser.add_argument("--no-open", action="store_true", help="do not open it in a browser")
    parser.add_argument("--quick", action="store_true", help="run no examples, of API or gallery")
    parser.add_argument("--record", metavar="NAME", nargs="+", help="run examples, keep outputs")
    parser.add_argument("--tables", action="store_true", help="write what the tests run anew")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE))
    if args.record:
        record(args.record)
    elif args.tables:
        import jax
        from site_parts import tested

        jax.config.update("jax_enable_x64", True)  # as the tests have it
        tested.write()
    else:
        build(args.quick)
        page = HERE / "build" / "html" / "index.html"
        print(page)
        if not args.no_open:
            webbrowser.open(page.as_uri())


def record(names: list[str]) -> None:
    """Run examples at their defaults, and keep what they print for the gallery."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    for name in names:
        command = [sys.executable, ROOT / "examples" / f"{name}.py"]
        with (HERE / "recorded" / f"{name}.txt").open("w") as out:
            subprocess.run(command, env=environment, stdout=out, check=True)


def build(quick: bool) -> None:
    """Run Sphinx, and beside it the examples of the reference."""
    from sphinx.cmd.build import main as sphinx

    start, built = time.perf_counter(), HERE / "build"
    options = ["-W", "--keep-going", "-q", "-d", f"{built}/doctrees"]
    beside = None
    if quick:
        options += ["-D", "sphinx_gallery_conf.plot_gallery=False"]
    else:
        beside = subprocess.Popen([sys.executable, "-m", "site_parts.doctests"], cwd=HERE)
    failed = sphinx([*options, str(HERE), f"{built}/html"])
    if failed or (beside is not None and beside.wait()):
        sys.exit(1)
    print(f"built in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
