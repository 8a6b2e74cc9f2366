"""The base of recurrent layers: their params, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import promoted, wide
from jaxprop.core.checks import check_counts, check_flags, check_x
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Outer, Sum
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import Mask, SideInput
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.layers.masks import mask_of
from jaxprop.layers.through_time import States, along_time, before, of_real, swap, through_time

X = Float[Array, "n t i"]
H = Float[Array, "n t f"]
State: TypeAlias = Array | tuple[Array, Array]


@serializable
class RecurrentParams(NamedTuple):
    """The params of a recurrent layer with G gates side by side, or their cotangents.

    Attributes:
        w: (I, G F), the weights of the input.
        u: (F, G F), the weights of the hidden state.
        b: (G F,), the bias.
        b_u: (F,), the bias of the recurrent product in n of a Gru; None in other layers.
        mask: ``()``, or the ``jp.Mask`` of a step.
    """

    w: Any
    u: Any
    b: Any
    b_u: Any = None
    mask: Any = ()


@serializable
class Kept(NamedTuple):
    """The residuals of a recurrent layer.

    Attributes:
        x: (N, T, I), with zeros where a step is not real.
        start: the states (N, F) that came with x; empty if x came alone.
        h: (N, T, F), the state after each step.
        slopes: the slopes from the layer's step, (N, T, ...).
    """

    x: X
    start: States
    h: H
    slopes: tuple[Array, ...]


class Recurrence(Layer):
    """The base of the recurrent layers, from x (N, T, I) to the hidden states h (N, T, features).

    x may also be a pair: such an x, and the state to start from in place of zeros. The state is h
    (N, F), or (h, c) for ``Lstm``. d_x is then such a pair too. In a chain, a layer whose output is
    "both" hands the next one its last state to start from.

    A ``jp.Mask``, which ``net.bind(params, mask=)`` puts into the params, says which steps are
    real. Other steps do not count, wherever they are: the state passes them unchanged, y is 0
    there, and no cotangent comes back from them.

    w starts as LeCun normal, each gate's block of u as orthogonal, and b as zeros.

    Attributes:
        features: the size of the hidden state.
        reverse: whether to start from the last step; y[:, t] still belongs to x[:, t].
        output: what y is: "sequence", all h; "last", the h (N, F) after the last real step (the
            first one, if reverse); or "both", the pair of all h and the last state.
        gates: the number of gates.
        states: the number of arrays in the state.
    """

    features: int
    reverse: bool = False
    output: Literal["sequence", "last", "both"] = "sequence"
    gates: ClassVar[int]
    states: ClassVar[int] = 1
    takes: ClassVar[type[Mask]] = Mask

    def __post_init__(self) -> None:
        check_counts(self, "features")
        check_flags(self, "reverse")
        if self.output not in ("sequence", "last", "both"):
            raise ValueError(
                f'{type(self).__name__}: output is "sequence", "last" or "both", '
                f"not {self.output!r}"
            )

    def init(self, key: Array, x: PyTree) -> RecurrentParams:
        x, start = self._parts(x)
        check_x(self, x, "N, T, I")
        if not x.shape[1] or not x.shape[2]:
            raise ValueError(f"{self} takes x of at least one step and one feature, not {x.shape}")
        if not all(jnp.issubdtype(state.dtype, jnp.floating) for state in start):
            raise TypeError(f"{self} starts from a floating state, not {shapes(start)}")
        expected = (x.shape[0], self.features)
        if any(state.shape != expected for state in start):
            raise ValueError(
                f"{self} starts from {self._state((expected,) * self.states)}, not "
                f"{shapes(self._state(start))}"
            )
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        for_w, *for_u = jax.random.split(key, 1 + self.gates)
        width, square = self.gates * self.features, (self.features, self.features)
        w = jax.nn.initializers.lecun_normal()(for_w, (x.shape[2], width), dtype)
        orthogonal = jax.nn.initializers.orthogonal(dtype=wide(jnp.zeros((), dtype)).dtype)
        u = jnp.concatenate([orthogonal(key, square) for key in for_u], axis=1)
        return RecurrentParams(w, u.astype(dtype), jnp.zeros(width, dtype))

    def with_side_input(self, params: Params, given: SideInput) -> Params:
        return params._replace(mask=given)

    def _along(
        self,
        step: Callable[..., tuple[States, tuple[Array, ...]]],
        params: RecurrentParams,
        x: PyTree,
    ) -> tuple[PyTree, Kept]:
        """Return y and the residuals, by a scan of ``step`` as ``along_time`` takes it."""
        x, start = self._parts(x)
        real = mask_of(self, params.mask, x)
        x = of_real(x, real)
        from_x = swap(x) @ params.w
        zero = wide(jnp.zeros_like(from_x[0, :, : self.features]))
        states = tuple(state.astype(zero.dtype) for state in start) or (zero,) * self.states
        last, h, slopes = along_time(step, from_x, states, real, self.reverse)
        last = tuple(state.astype(x.dtype) for state in last)
        kept = Kept(x, start, h, slopes)
        if self.output == "last":
            return last[0], kept
        y = of_real(h, real)
        return (y if self.output == "sequence" else (y, self._state(last))), kept

    def _through(
        self,
        step: Callable[..., tuple[States, PyTree]],
        params: RecurrentParams,
        residuals: Kept,
        ct: Cotangent,
        slopes: PyTree,
        *others: Array,
    ) -> tuple[States, PyTree]:
        """Return the cotangents of the states at the start, and d_t of all steps.

        They come from a scan of ``step`` as ``through_time`` takes it.
        """
        h = residuals.h
        self._check_ct(ct, h)
        if self.output == "sequence":
            ends = (jnp.zeros_like(ct[:, 0]),) * self.states
        elif self.output == "last":
            ct, ends = None, (ct, *[jnp.zeros_like(ct)] * (self.states - 1))
        else:
            ct, ends = ct[0], self._arrays(ct[1])
        ends = tuple(promoted(wide(end), jnp.zeros_like(wide(h[:, 0])))[0] for end in ends)
        real = mask_of(self, params.mask, h)
        return through_time(step, ct, ends, slopes, others, real, self.reverse)

    def _pulled(
        self, params: RecurrentParams, residuals: Kept, d_a: Array, d_s: Array, d_start: States
    ) -> tuple[RecurrentParams, PyTree]:
        """Return ``(d_params, d_x)`` from the cotangents of a_t = x_t w + b and s_t = h_(t-1) u."""
        x, start, h, _ = residuals
        real = mask_of(self, params.mask, h)
        h = before(h, start[0] if start else None, real, self.reverse)
        d_params = RecurrentParams(Outer(x, d_a), Outer(h, d_s), Sum(d_a))
        d_x = (d_a @ params.w.T).astype(x.dtype)
        if not start:
            return d_params, d_x
        d_start = tuple(d.astype(s.dtype) for d, s in zip(d_start, start, strict=True))
        return d_params, (d_x, self._state(d_start))

    def _parts(self, x: PyTree) -> tuple[Any, States]:
        """Return the sequence, and the arrays of the state that comes with it, if there is one."""
        if not isinstance(x, tuple):
            return x, ()
        if len(x) != 2 or jax.tree.structure(x[1]) != jax.tree.structure(
            self._state((0,) * self.states)
        ):
            state = "h" if self.states == 1 else "(h, c)"
            raise ValueError(f"{self} takes x, or a pair (x, {state}), not {shapes(x)}")
        return x[0], self._arrays(x[1])

    def _state(self, arrays: tuple[Any, ...]) -> Any:
        """Return the arrays of a state as users see it: one array, or a pair."""
        return arrays[0] if self.states == 1 else arrays

    def _arrays(self, state: Any) -> Any:
        return (state,) if self.states == 1 else state

    def _check_ct(self, ct: Cotangent, h: H) -> None:
        state = self._state(((h.shape[0], self.features),) * self.states)
        last = self._arrays(state)[0]
        y = {"sequence": h.shape, "last": last, "both": (h.shape, state)}[self.output]
        got = jax.tree.map(jnp.shape, ct)
        if got != y:
            raise ValueError(f"{self}: ct has shape {got}, but y has {y}")
