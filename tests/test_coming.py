"""JAX's switches that will become defaults: tests that depend on them run again with them on."""

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
    """In a separate process, since some are read on import."""
    there = [name for name in SWITCHES if name.lower() in jax.config.values]
    if not there:
        pytest.skip("this JAX has none of them")
    if len(there) < len(SWITCHES):  # before all existed, custom_vjp had no forward mode
        there = there[:1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", *FILES],
        cwd=HERE,
        env=os.environ | dict.fromkeys(there, "1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
