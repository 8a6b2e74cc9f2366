"""The rows for uses of a curvature, which is computed before the measurement."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from jax import Array

from jaxprop.bench.case import Case
from jaxprop.bench.measure import Function
from jaxprop.bench.networks import Network
from jaxprop.core.types import Params, PyTree
from jaxprop.curvature.ekfac import ekfac_factors
from jaxprop.curvature.influence_functions import influence, self_influence
from jaxprop.curvature.laplace import Posterior, laplace
from jaxprop.training.gradients import value_and_grad
from jaxprop.training.kfac import kfac
from jaxprop.training.update import Update, make_update

DAMPING = 1e-3


def influenced(network: Network, others: int) -> Case:
    """Return the case of the influence of the earlier examples on the last ``others``, by EKFAC."""
    net, loss, (params, x, target) = network
    curvature = _ekfac(network)
    batch, other = (x[:-others], target[:-others]), (x[-others:], target[-others:])

    def hand() -> Function:
        of = influence(net, loss)
        return lambda params, x, target, curvature: of(
            params, (x, target), other, curvature, DAMPING
        )

    return Case(hand, _gradient(network), (params, *batch, curvature))


def self_influenced(network: Network) -> Case:
    """Return the case of self-influence by EKFAC."""
    net, loss, args = network

    def hand() -> Function:
        of = self_influence(net, loss)
        return lambda params, x, target, curvature: of(params, x, target, curvature, DAMPING)

    return Case(hand, _gradient(network), (*args, _ekfac(network)))


def outputs(network: Network) -> Case:
    """Return the case of the outputs with their covariance, by Laplace's method."""
    net, loss, args = network
    posterior = jax.jit(laplace(net, loss))(*args)

    def hand() -> Function:
        def of(params: Params, x: Array, target: Array, posterior: Posterior) -> PyTree:
            return posterior.outputs(x)

        return of

    return Case(hand, _gradient(network), (*args, posterior))


def steps(network: Network, number: int) -> Case:
    """Return the case of ``number`` steps of K-FAC in one scan, against as many of Adam.

    The factors are decomposed once every ten steps.
    """
    net, loss, args = network
    params, x, target = args

    def updates() -> tuple[Update, Update]:
        by_kfac = kfac(net, loss, args, inverse_every=10)
        return make_update(net, loss, by_kfac), make_update(net, loss, optax.adam(1e-3))

    def maker(which: int) -> Callable[[], Function]:
        def make() -> Function:
            update = updates()[which]

            def trained(params: Params, states: list[PyTree], x: Array, target: Array) -> PyTree:
                def step(carry: tuple[Params, PyTree], _: None) -> tuple[PyTree, Array]:
                    params, state, value = update(*carry, x, target)
                    return (params, state), value

                carry = params, states[which]
                (params, state), values = jax.lax.scan(step, carry, length=number)
                return params, [*states[:which], state, *states[which + 1 :]], values

            return trained

        return make

    states = [update.init(params) for update in updates()]
    return Case(maker(0), maker(1), (params, states, x, target), carried=2)


def _ekfac(network: Network) -> PyTree:
    net, loss, args = network
    return jax.jit(ekfac_factors(net, loss))(*args)


def _gradient(network: Network) -> Callable[[], Function]:
    """Return a maker of jaxprop's gradient that takes the curvature too, and ignores it."""
    net, loss, _ = network

    def make() -> Function:
        gradient = value_and_grad(net, loss)
        return lambda params, x, target, given: gradient(params, x, target)

    return make
