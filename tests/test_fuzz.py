"""Random networks, dtypes, quantities, updates and transformations, against autodiff in float64.

All of a case is drawn from its number. To see one again: ``pytest tests/test_fuzz.py -n0 -s
--full -k test_random --fuzz-case 17 --fuzz-seconds 0``.
"""

import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from random_networks import DTYPES, Case, draw_case
from random_oracles import BOUND, Judge, answers, comparable, error, on

import jaxprop as jp
from jaxprop.core.side_inputs import takes_side_input
from jaxprop.core.tree import learned, merged

LARGEST = 2**10  # projection leaves sides that are no larger as they are
QUANTITIES = {
    "grads": jp.Gradient(),
    "each": jp.PerExampleGrads(),
    "norms": jp.SqNorms(),
    "gram": jp.Gram(),
    "moment": jp.SecondMoment(),
    "variance": jp.Variance(),
    "noise": jp.NoiseScale(),
    "clipped": jp.Clipped(BOUND),
    "in two passes": jp.Clipped(BOUND, two_pass=True),
    "automatic": jp.Clipped(BOUND, weight=jp.quantity.automatic),
    "clipped by layer": jp.Clipped(BOUND, per_layer=True),
    "diagonal": jp.DiagGGN(),
    "root": jp.GGNRoot(),
    "projected": jp.quantity.Projected(LARGEST, jax.random.key(0)),
    "kronecker": jp.KroneckerFactors(),
    "empirical": jp.KroneckerFactors(empirical=True),
}
PRODUCTS = {"hvp": jp.hvp, "ggn": jp.ggn_vp}  # with the params
BY_ITSELF = {"kronecker", "empirical"}  # compared with the library itself, under jax.jit
CLIPPED = {"clipped", "in two passes", "clipped by layer", "automatic"}
LIKE_PARAMS = {"grads", "finite", *CLIPPED, *PRODUCTS}
OPTIMIZERS = (
    optax.sgd(0.5, momentum=0.9),
    optax.adam(0.05, eps=1e-2),
    optax.adamw(0.05, eps=1e-2, weight_decay=0.1),
)
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec("d")
OF_EXAMPLES = dict.fromkeys(["each", "norms", "projected"], SPLIT) | {
    "root": PartitionSpec(None, "d")
}
SUMMED = {"value", "moment", "diagonal"}  # over devices, as gradients already are
NOT_ON_DEVICES = {"gram", "variance", "noise", *BY_ITSELF}
SEEDS = {  # the cases under each transformation, which cycle through the dtypes
    "jit": range(18),
    "vmap": range(18, 36),
    "scan": range(36, 54),
    # whose batches can be divided
    "shard_map": (3, 14, 19, 24, 28, 33, 38, 42, 49, 54, 59, 63, 68, 73, 81, 85, 87, 89),
    "micro_batches": (4, 15, 20, 29, 34, 50, 55, 64, 69, 74, 82, 86, 88, 91, 93, 94, 95, 96),
}
REFUSALS = (
    "has no Kronecker factors",
    "one that is cast takes x.astype(dtype)",
    "takes a padding mask",  # of another length, since the axes were moved
)


def check(number: int, dtype: str | None = None, how: str | None = None) -> str | None:
    """Return what is wrong with a case, or None.

    Args:
        number: the case.
        dtype: a name in ``DTYPES``; drawn if it is not given.
        how: the transformation; drawn if it is not given. If it is, no optimizer is tested.
    """
    rng = np.random.default_rng(number)
    drawn = str(rng.choice(list(DTYPES)))
    dtype = dtype or drawn
    case = draw_case(rng, dtype)
    print(f"\ncase {number}: {case.net}\n{case.loss} on {case.x.shape}, {dtype}, {case.given}")
    updating = rng.random() < 0.25 and how is None
    sentences = [*REFUSALS, *["couples the examples of a batch"] * case.net.batch_coupled]
    try:
        with jax.numpy_dtype_promotion("standard" if updating else "strict"):
            check_update(case, rng) if updating else check_quantities(case, rng, how)
    except Exception as wrong:
        if any(sentence in str(wrong) for sentence in sentences):
            print("refused")
            return None
        return "".join(traceback.format_exception(wrong))
    return None


@pytest.mark.few(1)
@pytest.mark.parametrize("number", range(5))
def test_a_few_random_networks(number: int) -> None:
    wrong = check(number)
    assert wrong is None, wrong


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", SEEDS)
def test_each_dtype_under_each_transformation(how: str, dtype: str) -> None:
    for number in SEEDS[how][list(DTYPES).index(dtype) :: len(DTYPES)]:
        wrong = check(number, dtype, how)
        assert wrong is None, f"case {number}, {dtype} under {how}: {wrong}"


@pytest.mark.full
def test_random_networks(request: pytest.FixtureRequest) -> None:
    """Cases for the given seconds, at least one; all failures are reported at the end."""
    number, seconds = (request.config.getoption(f"--fuzz-{name}") for name in ("case", "seconds"))
    end, found = time.monotonic() + seconds, []
    while True:
        wrong = check(number)
        found += [f"case {number}: {wrong}"] * (wrong is not None)
        number += 1
        if time.monotonic() >= end:
            break
        if number % 50 == 0:
            jax.clear_caches()
    assert not found, "\n".join(found)


def check_quantities(case: Case, rng: np.random.Generator, how: str | None = None) -> None:
    """Compare some quantities under a transformation with the oracle."""
    drawn = str(rng.choice(hows(case)))
    how = how or drawn
    assert how in hows(case), f"{how} is not for this case"
    names = draw_names(case, how, rng)
    devices = draw_devices(case, rng) if how == "shard_map" else 1
    options, dropped = draw_micro_batches(case, how, rng), None
    healthy = runs = batches(case, how)
    if "weights" in case.given:
        runs = spoilt(runs, np.asarray(case.given["weights"]) == 0)
    if "finite" in names and jnp.issubdtype(case.x.dtype, jnp.floating):
        dropped = int(rng.integers(len(case.x)))
        runs = spoilt(runs, np.arange(len(case.x)) == dropped)
    traced = how != "eager" and is_one_function(case, names) and rng.random() < 0.3
    f = made(in_one_function(case) if traced else case, names, options, rng)

    def of_batch(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        given = dict(batch)
        return f(params, given.pop("x"), given.pop("target"), **given)

    print(f"{', '.join(names)} under {how} {options or ''}{' as one function' * traced}")
    exact, same = (
        answers(case, net, tuple(name for name in names if name not in BY_ITSELF), dropped)
        for net in (case.exact, case.net)
    )
    judge = Judge(case.narrowest, exact, same)
    got = transformed(how, of_batch, runs, names, devices)
    for result, args, right in zip(got, runs, healthy, strict=False):
        for name in LIKE_PARAMS & result.keys():
            assert dtypes(result[name]) == dtypes(case.params), name
        judge(comparable(result), *right)
        for name in BY_ITSELF & result.keys():
            assert error(result[name], jax.jit(of_batch)(*args)[name], True) <= 1e-9, name


def made(case: Case, names: tuple[str, ...], options: dict[str, Any], rng: Any) -> Any:
    """Return the library's function that returns these quantities by name."""
    if names == ("value", "grads"):
        scale = float(rng.choice([1.0, 16.0]))
        pair = jp.value_and_grad(case.net, case.loss, loss_scale=scale, **options)
    elif names == ("value", "finite"):
        options = options | {"drop_nonfinite": True, "two_pass": bool(rng.integers(2))}
        pair = jp.clipped_grad(case.net, case.loss, BOUND, **options)
    elif names[-1] in PRODUCTS:
        (name,) = names
        product = PRODUCTS[name](case.net, case.loss)

        def with_params(params: Any, x: Any, target: Any, **given: Any) -> dict[str, Any]:
            return {name: product(params, x, target, learned(params), **given)}

        return with_params
    else:
        asked = {name: QUANTITIES[name] for name in names if name != "value"}
        return jp.quantities(case.net, case.loss, **asked, **options)

    def f(*args: Any, **given: Any) -> dict[str, Any]:
        return dict(zip(names, pair(*args, **given), strict=True))

    return f


def hows(case: Case) -> list[str]:
    """Return the transformations that do not change this case's results."""
    apart = not case.net.batch_coupled and "key" not in case.given and len(case.x) > 1
    return ["jit", "jit", "eager", "vmap", "scan", *["shard_map", "micro_batches"] * (2 * apart)]


def is_one_function(case: Case, names: tuple[str, ...]) -> bool:
    """Return whether the net is a function of x and of params that are all learned."""
    if case.net.batch_coupled or {"key", "mask"} & case.given.keys():
        return False
    all_learned = len(dtypes(case.params)) == len(jax.tree.leaves(case.params))
    return all_learned and not {"clipped by layer", *BY_ITSELF} & set(names)


def in_one_function(case: Case) -> Case:
    """Return the case with the net as a traced function."""
    net = case.net
    return case._replace(net=jp.function(lambda params, x: net.forward(params, x)[0]))


def draw_names(case: Case, how: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Return "value" and the names of some quantities that fit the case, or one product's name."""
    whole = how not in ("shard_map", "micro_batches") and "divisor" not in case.given
    if whole and rng.random() < 0.12:
        return (str(rng.choice(["hvp"] if case.net.batch_coupled else list(PRODUCTS))),)
    if case.net.batch_coupled:
        return ("value", "grads")
    if not {"mask", "key"} & case.given.keys() and rng.random() < 0.1:  # which may hide a NaN
        return ("value", "finite")
    names = set(QUANTITIES)
    if how == "shard_map":
        names -= NOT_ON_DEVICES
    if how == "micro_batches":
        names -= {"gram"}
    if "divisor" in case.given:
        names -= {"variance"}  # which a sum that is no mean does not have
    if case.narrowest != jnp.float64 or rng.random() < 0.8:
        names -= BY_ITSELF
    counted = np.sum(case.given.get("weights", len(case.x)))
    if case.narrowest != jnp.float64 or min(counted, len(case.x)) < 2:
        names -= {"noise"}
    drawn = rng.choice(sorted(names), min(len(names), int(rng.integers(1, 5))), replace=False)
    also = ["moment"] if "variance" in drawn else []
    return tuple(dict.fromkeys(["value", *map(str, drawn), *also]))


def draw_micro_batches(case: Case, how: str, rng: np.random.Generator) -> dict[str, Any]:
    if how != "micro_batches":
        return {}
    return {"micro_batches": int(rng.choice([n for n in (2, 3) if len(case.x) % n == 0]))}


def draw_devices(case: Case, rng: np.random.Generator) -> int:
    """Return a number of devices that the examples can be split over in equal parts."""
    return int(rng.choice([n for n in (2, 3, 4, 6) if len(case.x) % n == 0]))


def batches(case: Case, how: str) -> list[Any]:
    """Return two runs, (params, batch), of the same shapes, key and weights."""
    batch = {"x": case.x, "target": case.target, **case.given}
    if how == "shard_map" and "divisor" not in batch:
        batch["divisor"] = np.sum(case.given.get("weights", len(case.x)), dtype=float)
    if "divisor" in batch:
        batch["divisor"] = jnp.asarray(batch["divisor"])
    turned = {name: batch[name] for name in ("x", "target", "mask") if name in batch}
    other = jax.tree.map(lambda leaf: leaf[::-1], turned)

    def less(p: Any) -> Any:
        return (p * 0.75).astype(p.dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p

    return [(case.params, batch), (jax.tree.map(less, case.params), batch | other)]


def spoilt(runs: list[Any], wrong: np.ndarray) -> list[Any]:
    """Return the runs with NaN in x of these examples, unless x is ids."""

    def of(x: Any) -> Any:
        ill = x + on(wrong, jnp.full(x.shape, jnp.nan, x.dtype)) if x.dtype.kind != "i" else x
        return ill.astype(x.dtype)

    return [(params, batch | {"x": of(batch["x"])}) for params, batch in runs]


def transformed(
    how: str, f: Any, runs: list[Any], names: tuple[str, ...], devices: int
) -> list[Any]:
    """Return f(params, batch) for each of the runs, or for the first alone."""
    first, stacked = runs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    if how == "eager":
        return [f(*first)]
    if how == "shard_map":

        def share(params: Any, batch: Any) -> dict[str, Any]:
            result = {name: learned(of) for name, of in f(params, batch).items()}
            return result | jax.lax.psum({n: result[n] for n in SUMMED & result.keys()}, "d")

        ends = {name: OF_EXAMPLES.get(name, EVERYWHERE) for name in names}
        return [on_devices(devices, share, (EVERYWHERE, split(first[1])), ends)(*first)]
    if how == "vmap":
        ends = jax.jit(jax.vmap(f))(*stacked)
    elif how == "scan":
        ends = jax.jit(lambda *of: jax.lax.scan(lambda _, of: ((), f(*of)), (), of)[1])(*stacked)
    else:
        return [jax.jit(f)(*first)]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], ends) for i in range(len(runs))]


def on_devices(devices: int, f: Any, given: Any, ends: Any) -> Any:
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=ends))


def split(batch: dict[str, Any]) -> dict[str, PartitionSpec]:
    return {name: EVERYWHERE if name == "divisor" else SPLIT for name in batch}


def dtypes(tree: Any) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(learned(tree))]


def check_update(case: Case, rng: np.random.Generator) -> None:
    """Compare two steps of an optimizer, under a transformation, with optax and the oracle."""
    if takes_side_input(case.net, jp.Key) and "key" not in case.given:
        case.given["key"] = jax.random.key(1)
    how = str(rng.choice([how for how in hows(case) if how not in ("eager", "vmap")]))
    optimizer = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
    if case.narrowest == jnp.float16:  # where Adam's second moment is a subnormal number
        optimizer = OPTIMIZERS[0]
    options = draw_micro_batches(case, how, rng) | {
        "fused": bool(rng.integers(2)),
        "max_norm": [None, 0.1][rng.integers(2)],
        "skip_nonfinite": bool(rng.random() < 0.3),
        "loss_scale": float(rng.choice([1.0, 16.0])),
    }
    print(f"update {options} under {how}")
    runs = batches(case, how)
    update = jp.make_update(case.net, case.loss, optimizer, donate=False, **options)

    def step(carry: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        given = dict(batch)
        params, state, value = update(*carry, given.pop("x"), given.pop("target"), **given)
        return (params, state), jax.lax.psum(value, "d") if how == "shard_map" else value

    start, seen = case.params, [batch for _, batch in runs]
    carry, values = (start, update.init(start)), []
    if how == "scan":
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
        carry, values = jax.jit(lambda *of: jax.lax.scan(step, *of))(carry, stacked)
    else:
        if how == "shard_map":
            step = on_devices(
                draw_devices(case, rng), step, (EVERYWHERE, split(seen[0])), EVERYWHERE
            )
        for batch in seen:
            carry, value = step(carry, batch)
            values.append(value)
    got = {"moved": difference(carry[0], start), "values": jnp.stack(values)}
    exact, same = (
        trained(case, net, optimizer, options["max_norm"]) for net in (case.exact, case.net)
    )
    Judge(case.narrowest, exact, same)(got, start, {"x": seen[0]["x"], "seen": seen})


def trained(case: Case, net: jp.Layer, optimizer: Any, max_norm: float | None) -> Any:
    """Return a jitted f(params, batches) for the move of params in two steps, and the losses."""
    f = answers(case, net, ("value", "grads"))
    if max_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer)

    @jax.jit
    def train(params: Any, given: dict[str, Any]) -> dict[str, Any]:
        first, second = given["seen"]
        arrays, values = learned(params), []
        state = optimizer.init(arrays)
        for batch in (first | {"x": given["x"]}, second):
            result = f(merged(params, arrays), batch)
            values.append(result["value"])
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), result["grads"], arrays)
            updates, state = optimizer.update(grads, state, arrays)
            arrays = optax.apply_updates(arrays, updates)
        return {"moved": difference(arrays, params), "values": jnp.stack(values)}

    return train


def difference(new: Any, old: Any) -> Any:
    def of(new: Any, old: Any) -> Any:
        return new.astype(jnp.float64) - old.astype(jnp.float64)

    return jax.tree.map(of, learned(new), learned(old))
