"""Eigendecompositions of many matrices, shared out over devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxprop.curvature.algebra import Decomposed


def in_shares(mesh: Mesh) -> Decomposed:
    """Return a function that decomposes symmetric matrices (..., D, D), each on one device.

    All devices hold all matrices before, and all results after. The matrices are assigned from the
    largest to the smallest, each to the device with the least work so far, which is counted as D^3.

    Args:
        mesh: the mesh of devices, all axes of which are used.
    """
    axes = mesh.axis_names

    def decomposed(matrices: list[Array]) -> list[tuple[Array, Array]]:
        owner = _owners([matrix.size * matrix.shape[-1] for matrix in matrices], mesh.size)

        def share(device: int) -> Callable[..., Any]:
            def of(*matrices: Array) -> list[tuple[Array, Array]]:
                return [
                    tuple(jnp.linalg.eigh(matrix)) if mine == device else _zeros(matrix)
                    for matrix, mine in zip(matrices, owner, strict=True)
                ]

            return of

        def on_device(*matrices: Array) -> Any:
            index = jax.lax.axis_index(axes)
            return jax.lax.psum(jax.lax.switch(index, shares, *matrices), axes)

        shares = [share(device) for device in range(mesh.size)]
        everywhere = PartitionSpec()
        mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        return mapped(on_device, in_specs=everywhere, out_specs=everywhere)(*matrices)

    return decomposed


def _owners(costs: list[int], devices: int) -> list[int]:
    """Return the device that each matrix is assigned to."""
    owners, load = [0] * len(costs), [0] * devices
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def _zeros(matrix: Array) -> tuple[Array, Array]:
    return jnp.zeros(matrix.shape[:-1], matrix.dtype), jnp.zeros_like(matrix)
