"""Strict settings for every test: float64, no implicit promotion, eight CPU devices."""

import collections
import gc
import importlib.metadata
import os

# The tests compile far more than they run, so LLVM does not optimize, and where XLA has another
# emitter of kernels that compiles faster, that one is used, on one thread. Eight devices share few
# cores, so a collective may wait for long.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(200_000, 50, 100)  # tracing makes many objects, and few survive

# Every new shape compiles, so a deadline would only time the compiler. Examples are repeatable.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=8)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=40)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what is marked as exhaustive too")
    parser.addoption("--fuzz-seconds", type=float, default=600, help="how long test_fuzz.py takes")
    parser.addoption("--fuzz-case", type=int, default=5, help="the first case of test_fuzz.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: exhaustive, and run with --full alone")
    config.addinivalue_line("markers", "few(n): n of its cases, evenly spread; full the others")
    settings.load_profile("full" if config.getoption("--full") else "quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _mark_what_few_leaves(items)
    if not config.getoption("--full"):
        exhaustive = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def _mark_what_few_leaves(items):
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("full"):
            cases[item.function].append(item)
    for each in cases.values():
        (few,) = each[0].get_closest_marker("few").args
        kept = {len(each) * i // few for i in range(few)}
        for index, item in enumerate(each):
            if index not in kept:
                item.add_marker(pytest.mark.full)


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, for code that is not ours: optax's adam multiplies int by float."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def browser():
    """Chromium, started once per module."""
    from reading import CHROMIUM

    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page; at the end, assert that it logged nothing and asked nothing of the network."""
    wrong, asked, contexts = [], [], []

    def opened(text, **options):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(reduced_motion="reduce", **options))
        contexts[-1].set_default_timeout(120_000)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: wrong.append(error))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith("file:")] == []
