"""The form of a convolution's weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import field
from typing import ClassVar, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float

from jaxprop.core.arrays import added, known, weighted, wide
from jaxprop.core.forms import (
    Factored,
    OfX,
    Outer,
    Place,
    Sides,
    Stacked,
    Transposed,
    count_of,
    gram,
    norms,
    norms_of_all,
    of_real,
    pairs_are_cheaper,
    positions_of,
    sq_norms,
    through,
)
from jaxprop.core.forms.outer import DEARER
from jaxprop.core.loops import lanes_of, map_blocks, sum_examples, sum_over
from jaxprop.core.mesh import by_xla, devices_by_xla, is_explicit
from jaxprop.core.serialization import serializable
from jaxprop.layers.windows import Windows

BLOCK_BYTES = {"cpu": 2**22, "default": 2**28}  # of patches at a time; on a CPU they fit into cache
WIDE = 32  # channels of x: with at least as many, a matmul per tap is as fast as one for all


@serializable
class Patches(Factored):
    """The form of a convolution's weights: g_n[k] = sum over t of x[n, t s + k d] (outer) ct[n, t].

    The weights are (*window, C / groups, O), with a matrix for each tap k of the window. The inputs
    of one window are a patch. With a row for each patch, the form is ``Outer(patches of x, ct)``,
    and everything that holds for a dense layer along positions holds here. The patches of a batch
    are many times as large as x, so they are made for a block of examples at a time. Groups split
    the channels of x and of ct; each is a separate convolution.

    Attributes:
        x: (N, ..., C), the input.
        ct: (N, ..., O), the cotangent of the output.
        windows: the windows over x, with strides s and dilation d.
        groups: the number of groups.
    """

    x: Float[Array, "n ... c"]
    ct: Float[Array, "n ... o"]
    windows: Windows = field(metadata={"static": True, "read": Windows._make})
    groups: int = field(default=1, metadata={"static": True})
    is_pair: ClassVar[bool] = True
    room: ClassVar[int] = 2  # all else is made from patches, which are several times as large as x

    def per_example(self) -> Float[Array, "n ..."]:
        def of_examples(x: Array, ct: Array) -> Array:
            return self._folded(self._outers(Outer.per_example, x, ct))

        return self._in_blocks(functools.partial(_stacked, of_examples), self.x, self.ct)

    def sum(self) -> Array:
        as_convolution = self.groups > 1 or max(self.windows.spread) > 1
        if is_explicit(self.x):
            if as_convolution:
                return by_xla(Patches._convolved, lambda g: PartitionSpec(), self)
            return self._in_one()
        one = known(lambda: self.x.shape[0] == 1)  # as in a loop, whose lanes become groups in XLA
        if (self.groups > 1 or one) and devices_by_xla(self.x) > 1:
            return self._by_patches()
        if as_convolution:
            return self._convolved()
        return jax.lax.platform_dependent(
            self, cpu=Patches._block_by_block, default=Patches._convolved
        )

    def scaled(self, weights: Float[Array, " n"]) -> Patches:
        ct = weighted(wide(self.ct), weights)
        return Patches(wide(self.x), ct, self.windows, self.groups)

    def sq_norms(self) -> Float[Array, " n"]:
        return self._by_platform(
            lambda form: form._for_each(Outer.sq_norms, lambda groups: groups.sum(axis=0)),
            lambda form: added(*(sq_norms(tap.per_example()) for tap in form._by_taps())),
        )

    def norms(self) -> Float[Array, " n"]:
        return self._by_platform(
            lambda form: form._for_each(Outer.norms, norms_of_all),
            lambda form: norms_of_all(
                jnp.stack([norms(tap.per_example()) for tap in form._by_taps()])
            ),
        )

    def inner_products(self) -> Float[Array, "n n"]:
        return self._outers(Outer.inner_products, self.x, self.ct).sum(axis=0)

    def for_products(self, other: Factored) -> Factored:
        if not self._is_like(other):
            return super().for_products(other)
        if self._in_pairs(other):
            return self

        def of_examples(x: Array, ct: Array) -> Array:
            g = self._outers(lambda pair: Outer(pair.ct, pair.x).per_example(), wide(x), wide(ct))
            return jnp.moveaxis(g, 0, 1)

        return Stacked(self._in_blocks(functools.partial(_stacked, of_examples), self.x, self.ct))

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        if not (self._is_like(other) and self._in_pairs(other)):
            return super().products_with(other)  # by patches of some examples at a time

        def of_groups(form: Patches) -> Outer:
            ct = jnp.moveaxis(_in_groups(form.ct, form.groups), 2, 0)
            return Outer(_patches(form.x, form.windows, form.groups), ct)

        pair = of_groups(self), of_groups(other)
        return jax.vmap(lambda a, b: a.products_with(b))(*pair).sum(axis=0)

    def _is_like(self, other: Factored) -> TypeGuard[Patches]:
        return isinstance(other, Patches) and other.windows == self.windows

    def _in_pairs(self, other: Patches) -> bool:
        (n, *positions, features), (m, *others, _) = self.ct.shape, other.ct.shape
        sizes = self.sizes[0], features // self.groups
        return pairs_are_cheaper(n, math.prod(positions), m, math.prod(others), *sizes)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.windows.taps * (self.x.shape[-1] // self.groups), self.ct.shape[-1]

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        """Return (patches left)^T (ct right), with the patches of a block of examples at a time."""

        def of_examples(x: Array, ct: Array) -> Array:
            patches = _patches(wide(x), self.windows, self.groups)
            ct = jnp.moveaxis(_in_groups(wide(ct), self.groups), 2, 0)
            outs = jnp.eye(self.ct.shape[-1]) if sides.right is None else sides.right
            right = outs.reshape(self.groups, ct.shape[-1], outs.shape[-1])
            seen = ct @ right.astype(ct.dtype)[:, None]
            return jnp.einsum("gntk,gntl->nkl", through(patches, sides.left), seen)

        return self._in_blocks(functools.partial(_stacked, of_examples), self.x, self.ct)

    @property
    def place(self) -> Place:
        """The layout of the matrices, which for several groups are (groups, I, O / groups)."""
        return Place.of((Transposed((1, 0, 2)),) if self.groups > 1 else ())

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        rows, features = self.sizes
        if self.groups == 1:
            return rows, features
        return self.groups, rows, features // self.groups

    def squares(self) -> Array:
        def squares(x: Array, ct: Array) -> Array:
            return self._outers(Outer.sum, wide(x), wide(ct)) ** 2

        return self._folded(_added(squares, 1, self.x, self.ct)[:, None])[0]

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return positions_of(self.ct, real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        """Return the Gram matrix of the patches, summed over examples and positions.

        With the Gram matrix of ct it makes the factors of Grosse and Martens 2016,
        https://arxiv.org/abs/1602.01407. Each group has its own, on a leading axis.

        Args:
            real: False where an example, or a position of y, does not count.
            weights: the weight of each example; 1 by default.
        """

        def grams_of(x: Array, *roots: Array) -> Array:
            rows = _patches(wide(x), self.windows, self.groups)
            for root in roots:
                rows = _counted(rows, root.reshape(1, *rows.shape[1:3], 1))
            return jax.vmap(lambda rows: Outer(rows, rows).sum())(rows)

        roots = () if real is None and weights is None else (self._roots(real, weights),)
        grams = self._in_blocks(functools.partial(_added, grams_of), self.x, *roots)
        count = count_of(self.ct[..., 0], real, weights)
        return OfX(grams if self.groups > 1 else grams[0], count)

    def _roots(
        self, real: Bool[Array, "n ..."] | None, weights: Float[Array, " n"] | None
    ) -> Float[Array, "n ..."]:
        """Return the square root of the weight of each position of y; 0 for padding."""
        ones = jnp.ones_like(wide(self.ct[..., 0]))
        return of_real(ones, real, weights)

    def sum_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> Float[Array, "... i"]:
        """Return the sum of the patches over examples and positions, for each group."""
        axes = tuple(range(self.x.ndim - 1))
        counts = self._roots(real, weights)[..., None] ** 2
        taps = self.windows.shifted(wide(self.x))
        taps = [_counted(tap, counts).sum(axis=axes) for tap in taps]
        rows = jnp.stack(taps).reshape(self.windows.taps, self.groups, -1)
        sums = rows.swapaxes(0, 1).reshape(self.groups, -1)
        return sums if self.groups > 1 else sums[0]

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Factored:
        """Return each example's mean patch and sum of ct, as a convolution with one window.

        Args:
            real: False where an example, or a position of y, does not count.
        """
        axes = tuple(range(1, self.x.ndim - 1))
        counts = self._roots(real, None)[..., None]
        number = jnp.maximum(counts.sum(axis=axes), 1)
        taps = self.windows.shifted(wide(self.x))
        taps = [_counted(tap, counts).sum(axis=axes) / number for tap in taps]
        patch = jnp.stack(taps, axis=1).reshape(len(self.x), *self.windows.window, -1)
        ones, none = (1,) * len(axes), ((0, 0),) * len(axes)
        alone = Windows(self.windows.window, ones, none, ones, ones)
        return Patches(patch, wide(self.ct).sum(axis=axes, keepdims=True), alone, self.groups)

    def gram_of_ct(self) -> Float[Array, "... o o"]:
        grams = jax.vmap(gram)(jnp.moveaxis(_in_groups(self.ct, self.groups), 2, 0))
        return grams if self.groups > 1 else grams[0]

    def _outers(self, f: Callable[[Outer], Array], x: Array, ct: Array) -> Array:
        """Return f of each group's ``Outer``, with the group on a leading axis."""
        ct = jnp.moveaxis(_in_groups(ct, self.groups), 2, 0)
        outer = Outer(_patches(x, self.windows, self.groups), ct)
        if self.groups > 1:
            return jax.vmap(f)(outer)
        return f(Outer(outer.x[0], outer.ct[0]))[None]

    def _folded(self, g: Float[Array, "g n i o"]) -> Float[Array, "n ..."]:
        """Return g, which has a row for each tap and channel of a group, in the shape of w."""
        groups, n, rows, features = g.shape
        channels = rows // self.windows.taps
        g = g.reshape(groups, n, *self.windows.window, channels, features)
        return jnp.moveaxis(g, 0, -2).reshape(n, *self.windows.window, channels, groups * features)

    def _in_one(self) -> Array:
        """Return the sum from all patches at once, unreshaped, for a batch on several devices."""
        patches = jnp.concatenate(self.windows.shifted(self.x), axis=-1)
        return self._folded(Outer(patches, self.ct).sum()[None, None])[0]

    def _block_by_block(self) -> Array:
        """Return the sum by blocks of examples, with one matmul for all taps of a block.

        For x with many channels it takes one matmul for each tap, which copies only that tap's
        slice.
        """

        def total(x: Array, ct: Array) -> Array:
            x, ct = wide(x), wide(ct).reshape(-1, ct.shape[-1])
            taps = [tap.reshape(-1, x.shape[-1]) for tap in self.windows.shifted(x)]
            if x.shape[-1] < WIDE:
                return jnp.concatenate(taps, axis=-1).T @ ct
            return jnp.concatenate([tap.T @ ct for tap in taps])

        rows = _added(total, self._block("cpu"), self.x, self.ct)
        return self._folded(rows[None, None])[0]

    def _by_patches(self) -> Array:
        """Return the sum by patches, where XLA would see a convolution in groups on a mesh.

        On a mesh of two axes XLA computes these wrongly, up to JAX 0.12 at least: jax.grad of a
        grouped convolution is multiplied by the number of devices that have the same examples.
        """

        def sums(x: Array, ct: Array) -> Array:
            return self._outers(Outer.sum, wide(x), wide(ct))

        total = self._in_blocks(functools.partial(_added, sums), self.x, self.ct)
        return self._folded(total[:, None])[0]

    def _convolved(self) -> Array:
        """Return the sum as a convolution of x with ct: taps are the output, examples channels."""
        config = []
        for h, t, k, s, (low, _), d, e in zip(
            self.x.shape[1:-1], self.ct.shape[1:-1], *self.windows, strict=True
        ):
            reach = (t - 1) * s + (k - 1) * d + 1
            config.append((low, reach - low - (h - 1) * e - 1))
        axes = "HWD"[: len(config)]
        return jax.lax.conv_general_dilated(
            self.x,
            self.ct,
            self.windows.dilation,
            config,
            lhs_dilation=self.windows.spread,
            rhs_dilation=self.windows.strides,
            dimension_numbers=(f"C{axes}N", f"I{axes}O", f"{axes}NC"),
            batch_group_count=self.groups,
            preferred_element_type=wide(self.ct).dtype,
        )

    def _by_platform(
        self, by_blocks: Callable[[Patches], Array], by_taps: Callable[[Patches], Array]
    ) -> Float[Array, " n"]:
        """Return norms by blocks of patches, or on a TPU from ``_by_taps``, which computes g_n.

        A TPU squares g_n at the end of its matmul, and moving patches costs the most there.
        """
        t, (i, o) = math.prod(self.ct.shape[1:-1]), self.sizes
        grams = known(lambda: DEARER * t * (i + o) < i * o)
        if is_explicit(self.x) or self.groups > 1 or grams:
            return by_blocks(self)
        return jax.lax.platform_dependent(self, tpu=by_taps, default=by_blocks)

    def _by_taps(self) -> list[Outer]:
        """Return a form for each tap, or one for few channels, with patches by a convolution."""
        x, ct = wide(self.x), wide(self.ct)
        if x.shape[-1] >= WIDE:
            return [Outer(tap, ct) for tap in self.windows.shifted(x)]
        axes = "HWD"[: x.ndim - 2]
        patches = jax.lax.conv_general_dilated_patches(
            x,
            self.windows.window,
            self.windows.strides,
            self.windows.padding,
            lhs_dilation=self.windows.spread,
            rhs_dilation=self.windows.dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return [Outer(patches, ct)]

    def _for_each(
        self,
        f: Callable[[Outer], Float[Array, " n"]],
        together: Callable[[Float[Array, "g n"]], Float[Array, " n"]],
    ) -> Float[Array, " n"]:
        def of_examples(x: Array, ct: Array) -> Array:
            return together(self._outers(f, x, ct))

        return self._in_blocks(functools.partial(_stacked, of_examples), self.x, self.ct)

    def _in_blocks(self, f: Callable[..., Array], *arrays: Array) -> Array:
        """Return f of the platform's block size and the arrays."""
        sizes = {platform: self._block(platform) for platform in BLOCK_BYTES}
        if len(set(sizes.values())) == 1:
            return f(sizes["default"], *arrays)
        each: dict[str, Callable[..., Array]] = {
            platform: functools.partial(f, size) for platform, size in sizes.items()
        }
        return jax.lax.platform_dependent(*arrays, **each)

    def _block(self, platform: str) -> int:
        """Return for how many examples a device makes patches at a time, a divisor of its own N."""
        n, *positions, _ = self.ct.shape
        if is_explicit(self.x):
            return n
        if not isinstance(n, int):  # a symbol, in jax.export
            return 1
        row = self.windows.taps * self.x.shape[-1] * wide(self.x).dtype.itemsize
        for t in positions:
            row *= t
        most, own = max(1, BLOCK_BYTES[platform] // max(row, 1)), n // lanes_of(self.x)
        if platform == "cpu":
            most = min(most, max(1, own // 2))  # a loop, so that XLA makes no patches before it
        sizes = (size for size in range(1, own + 1) if own % size == 0 and size <= most)
        return max(sizes, default=0)


def _patches(x: Float[Array, "n ... c"], windows: Windows, groups: int) -> Float[Array, "g n t i"]:
    taps = [_in_groups(tap, groups) for tap in windows.shifted(x)]
    return jnp.moveaxis(jnp.concatenate(taps, axis=-1), 2, 0)


def _counted(rows: Array, counts: Array) -> Array:
    """Return rows times their weights, with 0 for padding, whatever the rows hold there."""
    return jnp.where(counts != 0, rows * counts, 0)


def _in_groups(x: Float[Array, "n ... c"], groups: int) -> Float[Array, "n t g i"]:
    n, *positions, channels = x.shape
    return x.reshape(n, math.prod(positions), groups, channels // groups)


def _added(f: Callable[..., Array], size: int, *arrays: Array) -> Array:
    """Return the sum of f over blocks of ``size`` examples."""
    if known(lambda: size >= arrays[0].shape[0]):
        return f(*arrays)
    if lanes_of(arrays) > 1:
        blocks = [array.reshape(len(array) // size, size, *array.shape[1:]) for array in arrays]
        return sum_examples(lambda block: f(*block), blocks)
    starts = jnp.arange(0, arrays[0].shape[0], size)
    return sum_over(lambda start: f(*_block(start, size, arrays)), starts)


def _stacked(f: Callable[..., Array], size: int, *arrays: Array) -> Array:
    """Return f of each example, by blocks of ``size`` examples."""
    lanes = lanes_of(arrays)
    if known(lambda: size * lanes == arrays[0].shape[0]):
        return f(*arrays)
    if lanes > 1:
        return map_blocks(lambda block: f(*block), size, arrays)
    starts = jnp.arange(0, arrays[0].shape[0], size)
    each = jax.lax.map(lambda start: f(*_block(start, size, arrays)), starts)
    return each.reshape(-1, *each.shape[2:])


def _block(start: Array, size: int, arrays: tuple[Array, ...]) -> list[Array]:
    """Return ``size`` examples as slices: XLA would compute the layer before a reshaped x twice."""
    return [jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays]
