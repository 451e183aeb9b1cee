"""Run by tests in a process of its own, with four virtual devices.

Without an argument, prints nothing if `clipped_value_and_grad` under shard_map gives what it gives
on one device; with `microbatches`, if under jit slices of a sharded batch do so too, and stay
sharded.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests.numerics import assert_close, enable_x64


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


# Under jit


def sequence_loss(params, tokens, y):
    x = params["table"][tokens]
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.square(hidden.sum() - y)


def microbatches() -> None:
    shapes = {"table": (30, 8), "w": (8, 16), "b": (16,)}
    with enable_x64(True):
        random = np.random.default_rng(0)
        params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
        # Slices of a multiple of as many samples as there are devices: unrolled, and in a loop.
        for mode in ("one_pass", "two_pass"):
            for num_samples, size in ((16, 8), (80, 4)):
                tokens = jnp.asarray(random.integers(0, 30, (num_samples, 5)))
                y = jnp.asarray(random.standard_t(1.5, num_samples)).at[3].set(jnp.nan)
                check_microbatches(mode, size, params, (tokens, y))


def check_microbatches(mode, size, params, batch) -> None:
    f = psc.clipped_value_and_grad(
        sequence_loss,
        psc.growing_threshold(0.5, 1.5),
        mode=mode,
        microbatch_size=size,
        return_stats=True,
    )
    mask = jnp.arange(len(batch[0])) != 5
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, by_sample = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    arguments = (*jax.device_put(batch, by_sample), jax.device_put(mask, by_sample))
    call = lambda params, tokens, y, mask: f(params, tokens, y, sample_mask=mask)
    compiled = jax.jit(call).lower(jax.device_put(params, everywhere), *arguments).compile()
    value, grads, stats = compiled(jax.device_put(params, everywhere), *arguments)
    wanted_value, wanted_grads, wanted_stats = jax.jit(call)(params, *batch, mask)
    assert_close((value, grads), (wanted_value, wanted_grads), 1e-10)
    assert_close(stats._replace(norms=()), wanted_stats._replace(norms=()), 1e-10)
    np.testing.assert_allclose(stats.norms, wanted_stats.norms, 1e-10)  # with the dropped one's
    moved = moving_operations(compiled.as_text())
    assert not moved, f"{mode}, slices of {size}: samples move between devices\n" + "\n".join(moved)


def moving_operations(text: str) -> list[str]:
    """What moves samples between devices where none was dropped.

    Sums over devices do not, nor does the count of a mask's samples, by which they have positions.
    Only where there are samples to drop is the body of a loop without a known number of steps run,
    or a branch taken but the first; they may gather.
    """
    run_if_dropped = set(re.findall(r"true_computation=([\w.%-]+)", text))
    for branches in re.findall(r"branch_computations={([^}]*)}", text):
        run_if_dropped.update(name.strip() for name in branches.split(",")[1:])
    loops = [line for line in text.splitlines() if " while(" in line]
    for loop in loops:
        if "known_trip_count" not in loop:
            run_if_dropped.update(re.findall(r"body=([\w.%-]+)", loop))
    moved, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        moves = re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
        if moves and computation not in run_if_dropped and "cumsum" not in line:
            moved.append(line.strip())
    return moved


if __name__ == "__main__":
    {"shard_map": main, "microbatches": microbatches}[(sys.argv[1:] or ["shard_map"])[0]]()
