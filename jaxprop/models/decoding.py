"""Decoding: a net that goes on from position to position, and the tokens that it gives.

``step`` says of each kind of layer how it goes on: most are applied to the new positions alone,
and attention keeps the keys and values of those before. It has nothing to do with backpropagation,
which is why it is not a method of the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxprop.combinators.branch import Branch
from jaxprop.combinators.cast import Cast
from jaxprop.combinators.chain import Chain
from jaxprop.combinators.frozen import Frozen
from jaxprop.combinators.on import On
from jaxprop.combinators.recompute import Recompute
from jaxprop.combinators.repeat import Repeat
from jaxprop.combinators.shared import Shared
from jaxprop.combinators.skip import Skip
from jaxprop.combinators.tied import Tied
from jaxprop.core.arrays import rounded, wide
from jaxprop.core.checks import check_count, check_number, require
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator, in_layer
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask, arrays
from jaxprop.core.types import Params, PyTree
from jaxprop.layers import Attention, Item, Positions, Rotary, SinusoidalPositions
from jaxprop.layers.attention import Keys, Queries
from jaxprop.layers.heads import Inputs, positions, split

State: TypeAlias = Any
"""What a layer keeps of the positions before: a pytree of arrays, ``()`` for nothing."""


class Now(NamedTuple):
    """Where a net is in its sequence.

    Attributes:
        at: the number of positions before x.
        length: the number of positions that there is room for.
    """

    at: Int[Array, ""]
    length: int


class Decoder(NamedTuple):
    """A net that goes on from position to position, two pure functions.

    Attributes:
        start: ``start(params, x) -> state``, from the first positions' x or their shapes.
        step: ``step(params, state, x) -> (y, state)``, for the T next positions x (N, T, ...).
    """

    start: Callable[[Params, PyTree], State]
    step: Callable[[Params, State, PyTree], tuple[PyTree, State]]


def decoder(net: Layer, length: int) -> Decoder:
    """Return the net as a function of the next positions and of a state that keeps the others.

    Going through a sequence in any pieces gives what ``net.forward`` gives at once, in ``jit`` and
    ``lax.scan`` too. A position costs what the layers cost on that position, but attention and
    ``Rotary`` go through ``length`` of them. Past ``length`` y is NaN.

    Every layer must let a position depend on those before alone: ``Attention`` is causal, or of a
    memory that is given whole, as in ``(x of the next positions, memory)``. A layer of your own is
    applied to the new positions, unless it says ``mixes_positions``; how it goes on then is
    registered as ``jp.models.decoding.step.register(MyLayer)``.

    Args:
        net: the network.
        length: the number of positions that there is room for.

    Raises:
        TypeError: for what is not a net, or not a whole number.
        ValueError: for a length below 1, and where the functions are used for a layer that needs
            later positions, couples examples, or mixes positions in a way that is not known.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.models.gpt2(jp.models.Gpt2Config(99, 16, 8, heads=2, layers=3))
        >>> ids = jnp.arange(5)[None]
        >>> params = net.init(jax.random.key(0), ids)
        >>> start, step = jp.models.decoder(net, 16)
        >>> y, state = step(params, start(params, ids), ids[:, :4])
        >>> last, state = step(params, state, ids[:, 4:])
        >>> bool(jnp.allclose(last, net.forward(params, ids)[0][:, 4:], atol=1e-5))
        True
    """
    require(net, Layer, "decoder: net")
    check_count("decoder: length", length)

    def begin(params: Params, x: PyTree) -> State:
        at = jnp.zeros((), int)
        kept = jax.eval_shape(
            lambda params, x: step(net, params, None, x, Now(at, length))[1], params, structs(x)
        )
        return at, jax.tree.map(jnp.zeros_like, kept)

    def go_on(params: Params, state: State, x: PyTree) -> tuple[PyTree, State]:
        at, kept = state
        end = at + jax.tree.leaves(x)[0].shape[1]
        y, kept = step(net, params, kept, x, Now(at, length))
        return jax.tree.map(lambda y: jnp.where(end <= length, y, jnp.nan), y), (end, kept)

    return Decoder(begin, go_on)


def generate(
    net: Layer,
    params: Params,
    prompt: Int[Array, "n p"],
    steps: int,
    *,
    key: Array | None = None,
    temperature: float | Array = 1.0,
) -> Int[Array, "n p+s"]:
    """Return the prompt and the tokens with which the net goes on, (N, P + steps).

    Args:
        net: a network from token ids (N, T) to logits (N, T, vocab), as ``decoder`` takes it.
        params: its params.
        prompt: (N, P), integers, of at least one token.
        steps: how many tokens are added.
        key: a key of ``jax.random.key`` with which they are drawn; without one each is the most
            likely.
        temperature: what the logits are divided by before a token is drawn.

    Raises:
        TypeError: for ids that are not integers, steps that are not a whole number, and a
            temperature that is not a number.
        ValueError: for a prompt without tokens, steps below 1 and a temperature that is not
            positive; and as ``decoder`` does.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.models.gpt2(jp.models.Gpt2Config(99, 16, 8, heads=2, layers=3))
        >>> prompt = jnp.ones((2, 3), int)
        >>> params = net.init(jax.random.key(0), prompt)
        >>> jp.models.generate(net, params, prompt, 4, key=jax.random.key(1)).shape
        (2, 7)
    """
    check_count("generate: steps", steps)
    check_number("generate: temperature", temperature, positive=True)
    if not jnp.issubdtype(getattr(prompt, "dtype", object), jnp.integer):
        raise TypeError(f"generate: prompt is token ids (N, P), not {shapes(prompt)}")
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"generate: prompt is (N, P) with P at least 1, not {prompt.shape}")
    keys = None if key is None else jax.random.split(key, steps)
    return _generated(net, params, jnp.asarray(prompt), steps, keys, temperature)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generated(
    net: Layer,
    params: Params,
    prompt: Int[Array, "n p"],
    steps: int,
    keys: Array | None,
    temperature: float | Array,
) -> Int[Array, "n p+s"]:
    start, go_on = decoder(net, prompt.shape[1] + steps)

    def drawn(logits: Float[Array, "n t v"], key: Array | None) -> Int[Array, " n"]:
        last = wide(logits[:, -1])
        if key is None:
            return jnp.argmax(last, -1).astype(prompt.dtype)
        return jax.random.categorical(key, last / temperature).astype(prompt.dtype)

    def ahead(carry: tuple[State, Array], key: Array | None) -> tuple[tuple[State, Array], Array]:
        state, token = carry
        logits, state = go_on(params, state, token[:, None])
        token = drawn(logits, key)
        return (state, token), token

    logits, state = go_on(params, start(params, prompt), prompt)
    first = drawn(logits, None if keys is None else keys[0])
    later = None if keys is None else keys[1:]
    _, tokens = jax.lax.scan(ahead, (state, first), later, length=steps - 1)
    return jnp.concatenate([prompt, first[:, None], tokens.T], 1)


@functools.singledispatch
def step(
    layer: Layer, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    """Return ``(y, state)``: the layer at the next positions, given what it keeps of the others.

    Args:
        layer: the layer, by whose class a rule is chosen. A layer without one is applied to x.
        params: its params.
        state: what it returned for the positions before; None at the start.
        x: its input at the next positions.
        now: where these are.
    """
    if not _is_by_position(layer):
        hint = "; take jp.inference_mode(net)" if layer.batch_coupled else ""
        raise ValueError(
            f"{layer} does not treat each position by itself, and how it goes on from position to "
            f"position is not known{hint}"
        )
    return layer.forward(params, x)[0], ()


def _is_by_position(layer: Layer) -> bool:
    """Return whether a layer without a rule, and all that it is made of, does the same anywhere."""
    has_rule = step.dispatch(type(layer)) is not step.dispatch(object)
    if has_rule and not isinstance(layer, Combinator | Cast | Shared):
        return False
    mixes = layer.mixes_positions or layer.takes is Mask or layer.batch_coupled
    return not mixes and all(_is_by_position(child.layer) for child in layer.children())


@step.register
def _attention(
    layer: Attention, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    """Keep k and v, (N, kv_heads, length, d), in which the later positions are not seen.

    The query heads that share a key are further queries at the same positions.
    """
    if isinstance(x, tuple) and not layer.causal and Inputs.of(x).bias is None:
        return layer.forward(params, x)[0], ()
    if isinstance(x, tuple) or not layer.causal or isinstance(params, Mask):
        raise ValueError(
            f"{layer} cannot go on from position to position: it must be causal, without a bias "
            "and a mask, or of a memory"
        )
    layer.check_params(params, x)
    q, *new = split(layer, Inputs(x))
    n, heads, t, d = q.shape
    room = jnp.zeros((n, heads // layer.groups, now.length, d), x.dtype)
    kept = (room, room) if state is None else state
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(before, z, now.at, 2)
        for before, z in zip(kept, new, strict=True)
    )
    at = jnp.tile(now.at + positions(0, t), (1, 1, layer.groups, 1))
    q = q.reshape(n, heads // layer.groups, layer.groups * t, d)
    (y, _), _ = layer.attend(Keys(k, v), Queries(q, at))
    return y.reshape(n, heads, t, d).swapaxes(1, 2).reshape(n, t, -1).astype(x.dtype), (k, v)


@step.register(Positions)
@step.register(Rotary)
@step.register(SinusoidalPositions)
def _where(
    layer: Layer, params: Params, state: State | None, x: Array, now: Now
) -> tuple[Array, State]:
    """Apply the layer to x at its place in a sequence of the whole length."""
    whole = jnp.zeros((x.shape[0], now.length, *x.shape[2:]), x.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, x, now.at, 1)
    y, _ = layer.forward(params, whole)
    return jax.lax.dynamic_slice_in_dim(y, now.at, x.shape[1], 1), ()


@step.register
def _chain(
    net: Chain, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    return _one_after_the_other(net.layers, params, state, x, now)


@step.register
def _shared(
    net: Shared, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    return _one_after_the_other([net.layer] * net.times, [params] * net.times, state, x, now)


def _one_after_the_other(
    layers: Sequence[Layer], params: Sequence[Params], state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    states = [None] * len(layers) if state is None else list(state)
    for i, layer in enumerate(layers):
        with in_layer(i, layer):
            x, states[i] = step(layer, params[i], states[i], x, now)
    return x, tuple(states)


@step.register
def _branch(
    net: Branch, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    ys, states = [], []
    for i, layer in enumerate(net.layers):
        with in_layer(i, layer):
            y, kept = step(layer, params[i], None if state is None else state[i], x, now)
        ys.append(y)
        states.append(kept)
    join = Branch(tuple(map(Item, range(len(ys)))), net.join)
    return join.forward(((),) * len(ys), tuple(ys))[0], tuple(states)


@step.register
def _repeat(
    net: Repeat, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    def ahead(x: PyTree, layer: tuple[Params, State | None]) -> tuple[PyTree, State]:
        return step(net.layer, *layer, x, now)

    net.check_params(params, x)
    with in_layer(0, net.layer):
        return jax.lax.scan(ahead, x, (params, state), length=net.times)


@step.register(Frozen)
@step.register(Recompute)
def _within(
    net: Frozen | Recompute, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    return step(net.layer, params, state, x, now)


@step.register
def _on(net: On, params: Params, state: State | None, x: PyTree, now: Now) -> tuple[PyTree, State]:
    part = Child(net.layer, net.part)
    y, state = step(net.layer, params, state, part.of(x), now)
    return part.put(x, y), state


@step.register
def _skip(net: Skip, params: Params, state: State | None, x: Array, now: Now) -> tuple[Any, State]:
    y, state = step(net.layer, params, state, x, now)
    return x + y, state


@step.register
def _cast(
    net: Cast, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    params = net.layer.rounded(params, net.dtype)
    return step(net.layer, params, state, rounded(x, net.dtype), now)


@step.register
def _tied(
    net: Tied, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    table, of_body = params
    rows, _ = net.embedding.forward(table, x)
    h, state = step(net.body, of_body, state, rows, now)
    return h @ arrays(table).astype(h.dtype).T, state
