"""Pallas kernels, for TPUs and GPUs, that process positions in blocks.

A program of such a kernel has its own block of positions, and meets the others that these see one
block at a time. Constants in kernels have an explicit dtype: with x64 they would be 64 bits wide,
which a TPU does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.typing import DTypeLike

from jaxprop.core.mesh import is_explicit, shard_map_axes, varying_struct
from jaxprop.core.types import PyTree
from jaxprop.layers.scores import Sight

try:  # JAX plans to remove it
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

Platform = Literal["cuda", "tpu"]
Carry = TypeVar("Carry")
Near = Callable[[Array], Array]
Turn = Callable[[Any, Near, Carry], Carry]
Over = Callable[[Turn[Carry], Carry], Carry]

VMEM = 64 * 2**20  # bytes of a TPU's on-chip memory that a program may take
LANES = 128


class Blocks(NamedTuple):
    """The blocks of positions that a kernel iterates over.

    Attributes:
        own: the number of a program's own positions.
        met: the number of other positions that it meets at a time.
        warps: the number of a GPU's warps that work on them.
        stages: the number of blocks that a GPU has in flight from its memory.
    """

    own: int
    met: int
    warps: int = 4
    stages: int = 2


def platforms(x: Array, t: int, d: int) -> list[Platform]:
    """Return the platforms on which kernels can meet t positions of d numbers each.

    XLA splits a kernel over GPUs (``spread``) but not over TPUs, where kernels run in programs for
    one device and in ``jax.shard_map``. A TPU holds all positions that a program meets on the chip;
    a GPU holds some of them, and has no kernels before compute capability 8.0.

    Args:
        x: an array that the kernel takes.
        t: the number of positions.
        d: how many numbers each position has.
    """
    axes, manual = jax.sharding.get_abstract_mesh().axis_names, shard_map_axes()
    if is_explicit(x) or (manual and len(manual) < len(axes)):
        return []
    device = jax.devices()[0]
    old = getattr(device, "compute_capability", "").split(".")[0] in ("5", "6", "7")
    alone = bool(manual) or (device.platform == "tpu" and jax.device_count() == 1)
    # two blocks of each of the two arrays that are met: one in use, one being loaded
    on_chip = 4 * t * -(-d // LANES) * LANES * x.dtype.itemsize
    both_have = x.dtype in (jnp.float32, jnp.bfloat16)
    cuda = triton is not None and not old and d * x.dtype.itemsize <= 1024
    has: dict[Platform, bool] = {
        "cuda": cuda and (both_have or x.dtype == jnp.float16),
        "tpu": alone and both_have and on_chip < VMEM * 3 / 4,
    }
    return [platform for platform, is_there in has.items() if is_there]


def instead(
    plain: Callable[..., PyTree], kernels: Mapping[Platform, Callable[..., PyTree]], *args: PyTree
) -> PyTree:
    """Return plain(*args), by a platform's kernel if it has one; JAX differentiates plain."""

    @jax.custom_jvp
    def chosen(*args: PyTree) -> PyTree:
        return jax.lax.platform_dependent(*args, default=plain, **kernels)

    @chosen.defjvp
    def _(primals: PyTree, tangents: PyTree) -> PyTree:
        return jax.jvp(plain, primals, tangents)

    return chosen(*args) if kernels else plain(*args)


def launch(
    platform: Platform,
    interpret: bool,
    kernel: Callable[..., None],
    blocks: Blocks,
    sight: Sight,
    own: Sequence[Any],
    met: Sequence[Any],
    outs: Sequence[DTypeLike | None],
) -> list[Array]:
    """Return the results of a kernel for all positions, with a program for each block of them.

    Args:
        platform: the platform of the kernel.
        interpret: whether to run on a CPU, one equation after the other.
        kernel: a function of ``over`` and of references to own, met and the results.
        blocks: the blocks of positions that it iterates over.
        sight: which of the others an own position sees.
        own: arrays of the programs' own positions, (N, heads, positions, d) or
            (N, heads, positions); the first has the former shape. An array of booleans says which
            positions are real, and None that all are. The kernel gets it as what to add to a score,
            0 or -inf, and None as None unless positions are padded.
        met: arrays of the other positions.
        outs: for each result with d numbers for each own position, its dtype; None for a result
            with one number, in float32.
    """
    (n, h, length, d), (_, g, others, _) = own[0].shape, met[0].shape
    heads, least = max(h, g), LANES if platform == "tpu" else 16  # the least that a matmul takes
    block, step = _fitting(least, blocks.own, length), _fitting(least, blocks.met, others)
    width = d if platform == "tpu" else max(least, pl.next_power_of_2(d))
    sight = Sight(*(far if far is not None and far < length + others else None for far in sight))
    own, met = _padded(own, block, width), _padded(met, step, width)
    padded, all_met, zero = own[0].shape[2], met[0].shape[2], np.int32(0)

    def spec(z: Any, size: int, number: Callable[[Any], Any]) -> pl.BlockSpec | None:
        """Return the part of z that a program has: ``size`` positions of one example and head."""
        if z is None:
            return None
        row, (examples, group) = z.shape[2] == 1, (n // z.shape[0], heads // z.shape[1])

        def at(example: Any, head: Any, program: Any) -> tuple[Any, ...]:
            here = (zero, number(program)) if row else (number(program), zero)
            return _quotient(example, examples), _quotient(head, group), *here

        return pl.BlockSpec((None, None, *((1, size) if row else (size, z.shape[3]))), at)

    struct = functools.partial(varying_struct, [z for z in (*own, *met) if z is not None])
    structs = [
        struct((n, heads, 1, padded), jnp.float32)
        if out is None
        else struct((n, heads, padded, width), out)
        for out in outs
    ]
    results = pl.pallas_call(
        functools.partial(kernel, functools.partial(_over, sight, block, step, all_met // step)),
        grid=(n, heads, padded // block),
        in_specs=[
            *(spec(z, block, lambda program: program) for z in own),
            *(spec(z, all_met, lambda _: zero) for z in met),
        ],
        out_specs=[spec(z, block, lambda program: program) for z in structs],
        out_shape=structs,
        compiler_params=_params(platform, blocks),
        interpret=interpret,
    )(*own, *met)
    return [
        z[:, :, 0, :length] if out is None else z[:, :, :length, :d]
        for z, out in zip(results, outs, strict=True)
    ]


def _params(platform: Platform, blocks: Blocks) -> Any:
    if platform == "tpu":
        return tpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM)
    assert triton is not None
    return triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def _over(sight: Sight, own: int, met: int, count: int, step: Turn[Carry], carry: Carry) -> Carry:
    """Return the carry of ``step(positions, near, carry)`` over all blocks that own positions see.

    ``near`` sets the scores of positions that are not seen to -inf. Blocks from ``clear`` to
    ``last`` are seen by all own positions and do not need it; the others from ``first`` to ``end``
    are seen by some.
    """
    start = pl.program_id(2) * own
    clear, last, end = map(jnp.int32, (0, count, count))
    if sight.after is not None:
        end = jnp.minimum(_quotient(start + own - 1 + sight.after, met) + 1, count)
        last = jnp.minimum(_quotient(start + 1 + sight.after, met), count)
    if sight.before is not None:
        clear = _quotient(jnp.maximum(start + own - 1 - sight.before, 0) + met - 1, met)
        clear = jnp.minimum(clear, end)
        last = jnp.maximum(last, clear)

    def in_part(block: Any, s: Array) -> Array:
        own_at, met_at = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
        seen: Any = sight.sees(start + own_at - (block * met + met_at))
        return jnp.where(seen, s, np.float32(-np.inf))

    def whole(block: Any, s: Array) -> Array:
        return s

    def run(near: Callable[[Any, Array], Array], low: Any, high: Any, carry: Carry) -> Carry:
        def body(block: Any, carry: Carry) -> Carry:
            at = pl.ds(pl.multiple_of(block * met, met), met)
            return step(at, functools.partial(near, block), carry)

        return jax.lax.fori_loop(low, high, body, carry)

    if sight.before is not None:
        first = _quotient(jnp.maximum(start - sight.before, 0), met)
        carry = run(in_part, first, clear, carry)
    carry = run(whole, clear, last, carry)
    if sight.after is not None:
        carry = run(in_part, last, end, carry)
    return carry


def _quotient(a: Any, b: int) -> Array:
    """Return a // b for an a that is not negative: one division, in 32 bits with x64 too."""
    return jax.lax.div(a, jnp.int32(b))


def _fitting(least: int, size: int, length: int) -> int:
    """Return the size of blocks for a length, at most ``size``; less if one were half padding."""
    size = min(size, max(least, pl.next_power_of_2(length)))
    while size > LANES and -length % size >= size // 2:
        size //= 2
    return size


def _padded(arrays: Sequence[Any], block: int, width: int) -> list[Any]:
    """Return the arrays padded to whole blocks, with rows as (N, heads, 1, positions)."""
    length = arrays[0].shape[2]
    more = -length % block

    def padded(z: Array | None) -> Array | None:
        if z is None:
            return padded(jnp.ones((1, 1, length), bool)) if more else None
        if z.ndim == 4:
            return jnp.pad(z, [(0, 0), (0, 0), (0, more), (0, width - z.shape[3])])
        z = jnp.pad(z, [(0, 0), (0, 0), (0, more)])[:, :, None]
        return jnp.where(z, 0.0, -jnp.inf).astype(jnp.float32) if z.dtype == bool else z

    return [padded(z) for z in arrays]
