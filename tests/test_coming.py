"""The switches that are to become JAX's defaults: what depends on them is tested once more."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent
SWITCHES = ("JAX_REMAT3", "JAX_CUSTOM_VJP3", "JAX_CUSTOM_JVP3")
FILES = (
    "test_function.py",
    "test_function_rules.py",
    "test_births.py",
    "test_check_vjp.py",
    "test_combinators.py",
)


@pytest.mark.full
def test_with_the_coming_switches():
    """In a process of its own, since they are looked at on import too."""
    there = [name for name in SWITCHES if name.lower() in jax.config.values]
    if not there:
        pytest.skip("this JAX has none of them")
    if len(there) < len(SWITCHES):  # until all were there, a custom_vjp had no forward mode
        there = there[:1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", *FILES],
        cwd=HERE,
        env=os.environ | dict.fromkeys(there, "1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
