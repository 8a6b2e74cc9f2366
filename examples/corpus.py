"""A text found on every machine: the source files of the Python standard library."""

import sysconfig
from pathlib import Path

import numpy as np


def load(seed: int, most: int = 4_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of the training files and of the held-out files, a tenth of all.

    Files with characters outside ASCII are left out.

    Args:
        seed: decides which files are held out.
        most: the maximum number of bytes of each part.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for text in (file.read_bytes() for file in files) if text.isascii()]
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out = max(1, len(texts) // 10)
    train = b"".join(texts[i] for i in order[held_out:])[:most]
    test = b"".join(texts[i] for i in order[:held_out])[:most]
    return np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8)


def starts(seed: int, steps: int, batch: int, length: int, text: np.ndarray) -> np.ndarray:
    """Return a random start of each window in the text, (steps, batch), drawn from the seed."""
    return np.random.default_rng([seed, 1]).integers(len(text) - length, size=(steps, batch))


def show(text: np.ndarray) -> str:
    """Return the bytes as indented lines of printable characters, cut at 80 columns."""
    lines = bytes(np.asarray(text, np.uint8)).decode("ascii", "replace").splitlines()
    return "\n".join("    " + "".join(c if c.isprintable() else " " for c in x)[:76] for x in lines)
