"""The memory of a data-parallel step on one to eight virtual devices, printed as JSON.

The number of CPU devices is fixed when a process starts, so this module runs as its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

COUNTS = (1, 2, 4, 8)
FLAG = "--xla_force_host_platform_device_count"


def memory() -> list[int]:
    """Return the temporary memory per device for each number of devices, from another process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={max(COUNTS)}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxprop.bench.growth.devices"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the temporary bytes of an MLP's step on 2048 examples, split over the devices."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxprop.bench.growth.rows import mlp
    from jaxprop.bench.measure import temp_bytes
    from jaxprop.training.update import make_update

    net, loss, (params, x, target) = mlp(width=256, batch=2048)
    sizes = []
    for count in COUNTS:
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        update = make_update(net, loss, optax.sgd(0.1), donate=False)
        state = update.init(params)
        given = (params, whole), (state, whole), (x, split), (target, split)
        step = jax.jit(update, out_shardings=whole)
        compiled = step.lower(*(jax.device_put(a, sharding) for a, sharding in given)).compile()
        sizes.append(temp_bytes(compiled))
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
