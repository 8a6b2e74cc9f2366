"""Strict settings for every test: float64 on, no implicit promotion, eight virtual CPU devices."""

import importlib.metadata
import os

# The tests compile far more than they run: LLVM is told not to optimize, and where XLA has another
# emitter of kernels that compiles faster, it is told to take that one, on one thread.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

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
