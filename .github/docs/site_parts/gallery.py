"""The gallery of ``examples/``: which there are, in what order, and which the build runs.

A script stays what it is. For the gallery a copy is staged, whose docstring has a title, and what
the script printed where the build does not run it: ``recorded/NAME.txt``, which
``build.py --record NAME`` writes.
"""

import ast
import builtins
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A script of ``examples/`` in the gallery.

    Attributes:
        title: its title.
        runs: whether the build runs it, which takes seconds.
    """

    title: str
    runs: bool = False


GROUPS: dict[str, tuple[str, dict[str, Example]]] = {
    "start": (
        "The idea",
        {
            "core": Example("The whole idea in a hundred lines", runs=True),
            "two_layer": Example("Two layers by hand", runs=True),
            "nan": Example("Where a NaN was born", runs=True),
            "digits": Example("Handwritten digits", runs=True),
        },
    ),
    "each": (
        "Per-example gradients",
        {
            "private_sgd": Example("DP-SGD", runs=True),
            "flax_private": Example("DP-SGD of a Flax network"),
            "equinox_noise_scale": Example("The noise scale of an Equinox transformer"),
            "tracin": Example("TracIn: which digits taught it"),
            "influence": Example("Influence by EKFAC"),
        },
    ),
    "curvature": (
        "Curvature",
        {
            "kfac": Example("K-FAC beside tuned Adam"),
            "laplace": Example("How sure a net should be"),
            "spectrum": Example("A Newton step and a spectrum"),
        },
    ),
    "rules": (
        "Another way back",
        {
            "learning_rules": Example("Five learning rules"),
            "local_learning": Example("Learning without a walk back"),
            "spiking": Example("Spikes and surrogate gradients"),
            "attribution": Example("Which pixels speak for a digit"),
        },
    ),
    "models": (
        "Models, and many devices",
        {
            "vae": Example("A variational autoencoder"),
            "gpt": Example("A GPT that writes Python"),
            "lstm": Example("An LSTM, a character at a time"),
            "three_c3d": Example("3C3D, and its gradient norms"),
            "resnet": Example("A ResNet"),
            "distributed": Example("Many processes and devices"),
            "plan": Example("What 1.5 B params need"),
        },
    ),
}
RECORDED = "It prints, with jax 0.10.2 on two shared cores of an AMD EPYC:"
PLACES = [(group, name) for group, (_, scripts) in GROUPS.items() for name in scripts]


def configuration(root: Path, here: Path) -> dict[str, Any]:
    """Stage the examples, and return the configuration of sphinx-gallery.

    Args:
        root: the repository.
        here: the folder of the site's sources.
    """
    staged = here / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    for old in {path.name for path in (here / "gallery").glob("*/")} - {*GROUPS, "images"}:
        shutil.rmtree(here / "gallery" / old)
    for group, (title, scripts) in GROUPS.items():
        folder = staged / group
        folder.mkdir(parents=True)
        (folder / "GALLERY_HEADER.rst").write_text(f"{title}\n{'-' * len(title)}\n")
        for name, example in scripts.items():
            (folder / f"{name}.py").write_text(_staged(root, here, name, example))
    head = (here / "gallery.rst").read_text()
    (staged / "GALLERY_HEADER.rst").write_text(head)
    sys.path.append(str(root / "examples"))  # the modules that they share
    runs = [name for _, scripts in GROUPS.values() for name, it in scripts.items() if it.runs]
    return {
        "examples_dirs": ["staged"],
        "gallery_dirs": ["gallery"],
        "filename_pattern": rf"/({'|'.join(runs)})\.py$",
        "subsection_order": [f"staged/{group}" for group in GROUPS],
        "within_subsection_order": "site_parts.gallery.order",
        "reset_modules": ("matplotlib", "site_parts.gallery.reset"),
        "reset_argv": "site_parts.gallery.arguments",
        "download_all_examples": False,
        "show_memory": False,
        "min_reported_time": 0,
        "remove_config_comments": True,
        "plot_gallery": True,
        "only_warn_on_example_error": False,
        "abort_on_example_error": True,
        "show_signature": False,
        "write_computation_times": False,
    }


def order(filename: str) -> int:
    """Return where a script stands in its group."""
    return [name for _, name in PLACES].index(Path(filename).stem)


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """Return the arguments that a script is run with: that it draws, if it does.

    sphinx-gallery runs its code without a ``__file__``, which is given to it here.
    """
    source = Path(script_vars["src_file"])
    builtins.__dict__["__file__"] = str(source)
    if '("plot", picture' in source.read_text():
        return ["--plot", f"{source.stem}.png"]  # in the folder of the staged script
    return []


def reset(gallery_conf: dict[str, Any], fname: str) -> None:
    """Put back the setting of JAX that a script may have changed."""
    import jax

    jax.config.update("jax_enable_x64", False)
    builtins.__dict__.pop("__file__", None)


def _staged(root: Path, here: Path, name: str, example: Example) -> str:
    source = (root / "examples" / f"{name}.py").read_text()
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree) or ""
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).lstrip("\n")
    title = example.title
    text = re.sub(r"((?:^    .*\n?)+)", r"::\n\n\1", docstring, flags=re.MULTILINE)
    text += "" if example.runs else _recorded(here, root, name)
    return f'r"""\n{title}\n{"=" * len(title)}\n\n{text}\n"""\n\n{code}'


def _recorded(here: Path, root: Path, name: str) -> str:
    """Return a paragraph with what the script printed, or with what the README says of it."""
    path = here / "recorded" / f"{name}.txt"
    if path.exists():
        lines = [RECORDED, "", ".. code-block:: text", ""]
        lines += [f"   {line}".rstrip() for line in path.read_text().splitlines()]
    else:
        readme = (root / "README.md").read_text()
        said = re.search(rf"^- (?:\[\w+\.py\]\S+ |.*; )?\[{name}\.py\](?:.|\n  )*", readme, re.M)
        text = " ".join(said.group().split()) if said else ""
        text = re.sub(r"^- |\[(\S+?)\]\([^)]*\)", r"\1", text).replace("`", "``")
        lines = textwrap.wrap(text, 96)
    return "\n\n" + "\n".join(lines)
