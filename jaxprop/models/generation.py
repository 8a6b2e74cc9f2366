"""Running a net position by position, and generating tokens with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_count, check_key, check_number, require
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params, PyTree
from jaxprop.models.decoding import Now, State, step


class Decoder(NamedTuple):
    """A net that runs position by position, as two pure functions.

    Attributes:
        start: ``start(params, x) -> state``, for x at the first positions, or its shapes.
        step: ``step(params, state, x) -> (y, state)``, for x (N, T, ...) at the T next positions.
    """

    start: Callable[[Params, PyTree], State]
    step: Callable[[Params, State, PyTree], tuple[PyTree, State]]


def decoder(net: Layer, length: int) -> Decoder:
    """Return the net as a function of the next positions and of a state of the previous ones.

    Running a sequence in pieces of any length returns what ``net.forward`` returns for the whole,
    also in ``jit`` and ``lax.scan``. A position costs what the layers cost on that position, except
    that attention and layers of positions run over ``length`` positions. Past ``length``, y is NaN.

    In every layer a position must depend only on itself and those before it: ``Attention`` is
    causal, or attends to a memory that is given whole at every step, as in
    ``(x of the next positions, memory)`` or a dict of both. Layers that depend on where a position
    is, such as ``Positions``, would take the memory for next positions: apply them to it
    beforehand. Each part of y has an axis of the next positions, by which they are counted. A layer
    of your own is applied to the new positions, unless it sets ``mixes_positions``; register a rule
    for it with ``jp.models.decoding.step.register(MyLayer)``.

    Args:
        net: the network.
        length: the number of positions that there is room for.

    Raises:
        TypeError: for a net that is not a layer, and a length that is not a whole number.
        ValueError: for a length below 1, and when the functions are used, for a layer that needs
            later positions, couples examples, or mixes positions without a rule, and for a y whose
            parts have different numbers of positions.

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
        y, kept = step(net, params, kept, x, Now(at, length))
        new = {leaf.shape[1:2] for leaf in jax.tree.leaves(y)}
        if len(new) != 1 or new == {()}:
            raise ValueError(f"decoder: y is {shapes(y)}, not of a number of next positions: {net}")
        end = at + new.pop()[0]
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
    """Return the prompt and the tokens with which the net continues it, (N, P + steps).

    They are int32, or of the prompt's dtype where that is wider and signed. A token is -1 where the
    logits are NaN, as they are after an id that the net's table lacks.

    Args:
        net: a network from token ids (N, T) to logits (N, T, vocab), as ``decoder`` takes it.
        params: its params.
        prompt: (N, P), integers, of at least one token.
        steps: the number of tokens to add.
        key: a key of ``jax.random.key`` to draw them with; without it, each is the most likely
            token.
        temperature: what the logits are divided by before a token is drawn.

    Raises:
        TypeError: for ids that are not integers, steps that are not a whole number, a temperature
            that is not a number, and a key of another kind.
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
    require(net, Layer, "generate: net")
    check_count("generate: steps", steps)
    check_number("generate: temperature", temperature, positive=True)
    if not jnp.issubdtype(getattr(prompt, "dtype", object), jnp.integer):
        raise TypeError(f"generate: prompt is token ids (N, P), not {shapes(prompt)}")
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"generate: prompt is (N, P) with P at least 1, not {prompt.shape}")
    if key is not None:
        check_key("generate", key)
    keys = None if key is None else jax.random.split(key, steps)
    holds_all = jnp.issubdtype(prompt.dtype, jnp.signedinteger) and prompt.dtype.itemsize >= 4
    ids = jnp.asarray(prompt, prompt.dtype if holds_all else jnp.int32)
    return _generated(net, params, ids, steps, keys, temperature)


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
            token = jnp.argmax(last, -1)
        else:
            token = jax.random.categorical(key, last / temperature)
        return jnp.where(jnp.isnan(last).any(-1), -1, token).astype(prompt.dtype)

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
