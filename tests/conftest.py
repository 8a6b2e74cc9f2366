"""Strict settings for every test: float64 on, no implicit promotion, eight virtual CPU devices."""

import os

# The tests compile far more than they run: LLVM is told not to optimize.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0"
)

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes compile; a deadline would only time the compiler. The same examples every time.
settings.register_profile("shapes", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("shapes")


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, for what is not ours: optax's adam multiplies integers by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield
