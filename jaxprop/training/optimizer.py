"""Optimizers that see only learned params."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprop.core.tree import for_optimizer, like_params, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.training.apply import LossOfStep

Optimizer = optax.GradientTransformation | optax.MultiSteps


def taking_extra_args(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer as a transformation that also takes extra arguments.

    They reach every update that can take them: that of ``optax.MultiSteps`` can, though its
    ``gradient_transformation()`` is of the type that takes none.

    Raises:
        TypeError: for an optimizer that is not an optax transformation.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is not an optax transformation such as optax.sgd(0.1) but {optimizer!r}"
        )
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        both: Any = optimizer.init, optimizer.update
        return optax.GradientTransformationExtraArgs(*both)
    assert isinstance(optimizer, optax.GradientTransformation)
    return optax.with_extra_args_support(optimizer)


def check_state(init: Callable[[Params], PyTree], params: Params, state: PyTree) -> None:
    """Raise ``TypeError`` unless the state has the arrays that init makes for params.

    Args:
        init: the function that makes a state from params.
        params: the net's params.
        state: the state to check.
    """
    structs = jax.eval_shape(init, params)
    made, got = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(t)}
        for t in (structs, state)
    )
    for name in made | got:
        if made.get(name) != got.get(name):
            there, expected = (
                f"of shape {shape[name]}" if name in shape else "missing" for shape in (got, made)
            )
            raise TypeError(
                f"state{name} is {there}, but for this optimizer and these params it is "
                f"{expected}; start from state = update.init(params)"
            )
    if jax.tree.structure(structs) != jax.tree.structure(state):  # parts without arrays differ
        raise TypeError(
            "state has the structure of another optimizer's; start from state = update.init(params)"
        )


def learned_only(
    optimizer: Optimizer,
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for trees that also hold unlearned arrays, which it leaves alone.

    ``jp.make_update`` does this for you. In a loop of your own, it is the one line that keeps
    weight decay, noise and optimizer state away from running statistics and frozen weights. Use the
    result, and ``optax.apply_updates``, with whole params and with the gradients that this library
    returns for them. (``optax.apply_updates`` cannot add to a typed key among the params; in
    ``jp.make_update`` one may stand there.)

    Args:
        optimizer: any optax transformation. A tree of masks or labels in it may be made from whole
            params, by ``jax.tree.map``. Extra arguments like params, and a ``value_fn`` of params,
            are those of whole params too.

    Raises:
        TypeError: for an optimizer that is not an optax transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxprop as jp
        >>> net, x = jp.chain(jp.frozen(jp.Dense(3)), jp.Dense(2)), jnp.ones((4, 5))
        >>> params = net.init(jax.random.key(0), x)
        >>> optimizer = jp.learned_only(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)))
        >>> state = optimizer.init(params)
        >>> _, grads = jp.value_and_grad(net, jp.HalfSquaredError())(params, x, jnp.ones((4, 2)))
        >>> updates, state = optimizer.update(grads, state, params)
        >>> new = optax.apply_updates(params, updates)
        >>> bool((new[0].w.value == params[0].w.value).all())
        True
    """
    inner = taking_extra_args(optimizer)

    def init(params: Params) -> PyTree:
        return inner.init(for_optimizer(params))

    def update(
        updates: PyTree, state: PyTree, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        of_learned = None if params is None else for_optimizer(params)
        extra = for_optimizer(extra)
        if params is not None and "value_fn" in extra:
            extra["value_fn"] = _of_learned(extra["value_fn"], params)
        new, state = inner.update(for_optimizer(updates), state, of_learned, **extra)
        return like_params(updates if params is None else params, new), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _of_learned(value_fn: Callable[..., Any], params: Params) -> Callable[..., Any]:
    """Return a function of whole params as one of the arrays that the optimizer holds."""
    if isinstance(value_fn, LossOfStep):  # it is one already
        return value_fn
    return lambda arrays, *rest, **given: value_fn(merged(params, arrays), *rest, **given)
