"""Run by test_clipped_grad.py in a process of its own, with four virtual devices.

Prints nothing if `clipped_value_and_grad` under shard_map gives what it gives on one device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests.numerics import assert_close


def loss(params, x, y):
    return jnp.square(jnp.tanh(x @ params["w"]).sum() + params["b"] - y)


def main() -> None:
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(())}
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.t(keys[0], 1.5, (8, 3)), jax.random.t(keys[1], 1.5, (8,))
    mask = np.array([1, 0, 1, 1, 1, 0, 0, 1], bool)
    threshold = psc.growing_threshold(0.5, 1.5)
    value, grads, stats = psc.clipped_value_and_grad(loss, threshold, return_stats=True)(
        params, x, y, sample_mask=mask
    )
    mesh = Mesh(np.array(jax.devices()), ("data",))
    specs = (P(), P(), psc.ClipStats(P("data"), P("data"), P(), P()))
    for mode in ("one_pass", "two_pass", "vmap"):
        for check_vma in (True, False):
            local = psc.clipped_value_and_grad(
                loss,
                threshold,
                mode=mode,
                axis_name="data",
                return_stats=True,
                microbatch_size=1 if mode == "one_pass" else None,
            )
            sharded = jax.shard_map(
                lambda params, x, y, mask, local=local: local(params, x, y, sample_mask=mask),
                mesh=mesh,
                in_specs=(P(), P("data"), P("data"), P("data")),
                out_specs=specs,
                check_vma=check_vma,
            )
            got = jax.jit(sharded)(params, x, y, mask)
            assert_close(got, (value, grads, stats), 1e-5)


if __name__ == "__main__":
    main()
