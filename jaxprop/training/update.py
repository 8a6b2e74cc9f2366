"""The step of a training loop: new params and optimizer state from one batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jaxprop.core.arrays import check_fit, is_one
from jaxprop.core.checks import check_count, check_flag, check_number, given as described
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.tree import check_learned, for_optimizer
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss
from jaxprop.quantity.micro_batches import check_apart
from jaxprop.training import gradients
from jaxprop.training.apply import DynamicLossScale, Options, make_apply
from jaxprop.training.donation import fit_to_donate, owned
from jaxprop.training.gradients import Differentiate, ValueAndGrad
from jaxprop.training.optimizer import Optimizer, check_state, taking_extra_args
from jaxprop.training.steps import fused_step, whole_step


class Update:
    """The jitted update that ``jp.make_update`` returns.

    ``update(params, state, x, target, key=None, mask=None)`` returns ``(params, state, value)``, or
    with ``aux=True`` ``(params, state, (value, aux))``. ``update.init(params)`` is the state to
    start from. ``update.trace(...)`` and ``update.lower(...)`` are those of ``jax.jit``, so that
    ``jax.export.export(update)`` works too. Before its result can be written to disk, the types of
    optax's state must be registered by ``jax.export.register_namedtuple_serialization``.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        init: Callable[[Params], PyTree],
        donate: bool = True,
        shown: str = "update",
    ) -> None:
        self._init = init
        self._shown = shown
        self._donate = donate

        @functools.wraps(step)
        def checked(params: Params, state: PyTree, *args: Any, **given: Any) -> Any:
            check_state(init, params, state)
            return step(params, state, *args, **given)

        self._step = jax.jit(checked, donate_argnames=("params", "state") if donate else ())

    def __repr__(self) -> str:
        return self._shown

    def init(self, params: Params) -> PyTree:
        """Return the state to start from, in separate memory."""
        return self._init(params)

    def __call__(
        self,
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree = None,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> tuple[Params, PyTree, Any]:
        """Return params and state after one step, and the loss before it.

        Args:
            params: the net's params; their memory is used for the result, unless ``donate=False``.
            state: the optimizer's state, whose memory is used in the same way.
            x: the inputs, with the example on axis 0.
            target: the targets.
            key: a key of ``jax.random.key``, a new one each step, for layers and noise that draw.
            mask: bool (N, T), True where a position is real.
            weights: (N,), the weight of each example in every mean; 1 by default.
            divisor: the divisor of sums over examples; the sum of the weights by default.

        Raises:
            TypeError: for the state of another optimizer or of other params, and for a divisor that
                is not a number.
            ValueError: for a net with a layer that draws, such as ``Dropout``, without a key, and
                for a divisor that is not positive.
        """
        if state is None:
            raise TypeError("state is None: start from state = update.init(params)")
        if divisor is not None and not isinstance(divisor, Array):
            check_number("divisor", divisor, positive=True)
        check_fit({"x": x, "target": target})
        if self._donate:
            params, state = fit_to_donate((params, state))
        return self._step(params, state, x, target, key, mask, weights, divisor)

    def trace(self, *args: Any, **given: Any) -> Any:
        """Return the step traced for these arguments, as ``jax.jit(...).trace`` does."""
        return self._step.trace(*args, **given)

    def lower(self, *args: Any, **given: Any) -> Any:
        """Return the step lowered for these arguments, as ``jax.jit(...).lower`` does."""
        return self._step.lower(*args, **given)


def make_update(
    net: Layer,
    loss: Loss,
    optimizer: Optimizer,
    *,
    fused: bool = False,
    max_norm: float | Array | None = None,
    skip_nonfinite: bool = False,
    loss_scale: float | Array | DynamicLossScale = 1.0,
    micro_batches: int = 1,
    value_and_grad: Differentiate | None = None,
    aux: bool = False,
    donate: bool = True,
) -> Update:
    """Return a jitted ``update(params, state, x, target, key, mask) -> (params, state, value)``.

    params and state are donated: their memory is used for the results, and the arrays that were
    passed in cannot be used again. To keep them (the best params so far, the start of a moving
    average), copy them first, or pass ``donate=False``. Arrays that are not learned stay as they
    are, and have no optimizer state, except that the running statistics of each BatchNorm in
    training are moved towards those of the batch, as by ``jp.update_batch_stats``. A net with a
    layer that draws, such as ``Dropout``, takes a key each step. In ``jax.shard_map``, ``value`` is
    the mean over a device's own examples, and the gradient is the sum over devices, as with
    autodiff there.

    Args:
        net: the network.
        loss: the loss; its mean over examples is minimised, and ``value`` is that mean before the
            update.
        optimizer: any optax transformation; start from ``state = update.init(params)``. One that
            asks for the value, the gradient or the loss as a function (``optax.lbfgs``,
            ``optax.polyak_sgd``, ``reduce_on_plateau``) is given them.
        fused: update each layer's params on the walk back, as soon as their gradient exists, so
            that the gradients of all params are never in memory together. In a ``repeat``, params
            and state are updated in place, whatever the depth. The optimizer's update of a param
            must depend on that param alone, as with SGD with momentum, Adam, AdamW and Lion, with
            schedules and masks; in a ``repeat``, each entry must be updated independently. Other
            optimizers raise ``ValueError``. So does ``optax.MultiSteps``, which looks at all
            gradients to skip a step, and keeps a sum of them.
        max_norm: scale the gradient down to at most this global norm before the optimizer sees it,
            as ``optax.clip_by_global_norm`` does. With ``fused``, a separate walk computes the norm
            first.
        skip_nonfinite: if the loss or the norm of the gradient is not finite, leave params and
            state as they are and count the step. The state is then ``Skipping(state, skipped)``.
            With ``fused``, this too needs the walk for the norm.
        loss_scale: the factor that scales the walk back, as in ``jp.value_and_grad``, for a net
            that computes in float16. ``jp.DynamicLossScale()`` adapts it during training, and skips
            the steps that overflow; the state is then ``Scaling(state, skipped, scale, steps)``.
        micro_batches: the number of equal parts to split the batch into, which are processed one
            after the other in the memory of one. With ``fused``, the gradients of all but the last
            are summed first, and that sum is as large as params.
        value_and_grad: how to differentiate: a maker that is called with the net and the loss, and
            with ``micro_batches=``, ``loss_scale=`` and ``aux=`` where these are asked for. The
            default is ``jp.value_and_grad``; for autodiff pass ``jp.autodiff``, and for DP-SGD
            ``functools.partial(jp.clipped_grad, max_norm=1.0, noise_multiplier=1.0)``. Not with
            ``fused``.
        aux: whether ``update`` returns ``(params, state, (value, aux))``, where aux is a ``jp.Aux``
            with the net's output, the norm of the gradient if an option such as ``max_norm`` needs
            it, and from ``jp.clipped_grad`` the norms and the share that was clipped. Add any
            quantity by ``value_and_grad=functools.partial(jp.value_and_grad, also={...})``.
        donate: whether to use the memory of params and state for the results.

    Raises:
        TypeError: for a net, loss, optimizer or option of the wrong type. ``update`` raises it for
            a state that does not belong to this optimizer and these params.
        ValueError: for a max_norm that is not positive, and for options that exclude each other.
    """
    check_net_and_loss(net, loss)
    optimizer = taking_extra_args(optimizer)
    flags = {"fused": fused, "skip_nonfinite": skip_nonfinite, "aux": aux, "donate": donate}
    for name, flag in flags.items():
        check_flag(name, flag)
    if max_norm is not None:
        check_number("max_norm", max_norm, positive=True)
    if fused and value_and_grad is not None:
        raise ValueError("fused walks back by itself: give fused or value_and_grad, not both")
    check_count("micro_batches", micro_batches)
    if loss_scale is DynamicLossScale:
        raise TypeError("loss_scale is the class DynamicLossScale; write DynamicLossScale()")
    if not isinstance(loss_scale, DynamicLossScale):
        check_number("loss_scale", loss_scale, positive=True)
    options = Options(max_norm, skip_nonfinite, loss_scale, micro_batches, aux)
    apply = make_apply(optimizer, options)
    if fused:
        if micro_batches > 1:
            check_apart(net)
        step = fused_step(net, loss, apply, options)
    else:
        make = value_and_grad or gradients.value_and_grad
        step = whole_step(net, loss, apply, options, _maker(make, net, loss, options))

    def init(params: Params) -> PyTree:
        net.check_places(params)
        check_learned(params)
        return owned(lambda arrays: options.around(optimizer.init(arrays)), for_optimizer(params))

    return Update(step, init, donate, f"make_update({net!r}, {loss!r}, ...)")


def _maker(
    make: Callable[..., ValueAndGrad], net: Layer, loss: Loss, options: Options
) -> Callable[[float | Array], ValueAndGrad]:
    """Return a function of a loss scale that calls the maker, whose arguments are checked here."""
    if not callable(make) or "params" in inspect.signature(make).parameters:
        raise TypeError(
            f"value_and_grad= is a maker, such as jp.value_and_grad itself, called with the net "
            f"and the loss; not {make!r}"
        )
    given: dict[str, Any] = {}
    if options.micro_batches > 1:
        given["micro_batches"] = options.micro_batches
    if options.aux:
        given["aux"] = True
    scaled = {} if is_one(options.loss_scale) else {"loss_scale": 1.0}
    for name, value in (given | scaled).items():
        try:
            inspect.signature(make).bind(net, loss, **{name: value})
        except TypeError:
            raise TypeError(
                f"value_and_grad is called with {name}= where that is asked for, and this one does "
                "not take it, as jp.value_and_grad does"
            ) from None
    if is_one(options.loss_scale):
        made = _made(make, net, loss, **given)
        return lambda scale: made
    return lambda scale: _made(make, net, loss, loss_scale=scale, **given)


def _made(
    make: Callable[..., ValueAndGrad], net: Layer, loss: Loss, **options: Any
) -> ValueAndGrad:
    """Return the maker's result; if it fails, add a note on how it is called."""
    try:
        made = make(net, loss, **options)
    except Exception as error:
        error.add_note(
            "value_and_grad= is called with the net and the loss; bind what else it takes by "
            "functools.partial, and for jax.value_and_grad write jp.autodiff"
        )
        raise
    if not callable(made):
        raise TypeError(f"value_and_grad= makes a function of a batch, not {described(made)}")
    return made
