"""Messages of `clipped_value_and_grad` about the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests.messages.rows import PARAMS, Row, X, Y, four_devices, grad, loss, of_x, on_four_devices


def normalised(params, x):
    return jnp.sum((x - x.mean(0)) / (1 + x.std(0)) @ params["w"])


def printing(params, x):
    jax.debug.print("{}", x, ordered=True)
    return of_x(params, x)


def exported_with_symbols():
    (n,) = jax.export.symbolic_shape("n")
    run = jax.jit(lambda x: psc.clipped_grad(of_x, 1.0)(PARAMS, x))
    jax.export.export(run)(jax.ShapeDtypeStruct((n, 3), jnp.float32))


def verified_with_an_axis():
    f = psc.clipped_grad(of_x, 1.0, axis_name="i")
    jax.vmap(lambda x: f.verify(PARAMS, x).ok, axis_name="i")(X[None])


def closing_over_a_sharded_array():
    mesh = four_devices(AxisType.Explicit)
    x, w = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((X, P("data")), (X[0], P())))
    f = psc.clipped_grad(lambda params, x: jnp.dot(params, x) * jnp.sum(w), 1.0)
    return jax.jit(f)(w, x)


ROWS = [
    # clipped_value_and_grad: the loss
    Row(
        lambda: grad(lambda params, x, y: x @ params["w"]),
        TypeError,
        "the loss is of ONE example and returns a scalar, got float32[2]; average what is left "
        "of it, write has_aux=True if it returns (loss, aux), or keep_batch_dim=True if it is "
        "written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: (loss(params, x, y), x)),
        TypeError,
        "the loss is of ONE example and returns a scalar, got (float32[], float32[3]); average "
        "what is left of it, write has_aux=True if it returns (loss, aux), or "
        "keep_batch_dim=True if it is written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: "loss"),
        TypeError,
        "the loss is of ONE example and returns a scalar, got a str; average what is left of "
        "it, write has_aux=True if it returns (loss, aux), or keep_batch_dim=True if it is "
        "written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: jnp.sum(x > 0)),
        TypeError,
        "the loss is a real floating-point scalar, got int32[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: grad(has_aux=True),
        TypeError,
        "with has_aux=True the loss returns (loss, aux), got float32[]; return the pair, or "
        "write has_aux=False",
    ),
    Row(
        lambda: grad(lambda params, x, y: (loss(params, x, y), {"name": "x"}), has_aux=True),
        TypeError,
        "aux['name'] is a str, but expected an array; aux is stacked over the samples, so close"
        " over what is no array",
    ),
    Row(
        lambda: grad(of_x),
        TypeError,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[3], float32[]), without a batch axis; one that is written for batches needs "
        "keep_batch_dim=True.",
    ),
    Row(
        lambda: grad(lambda params, x, y: jnp.mean(loss(params, x, y), axis=0)),
        Exception,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[3], float32[]), without a batch axis; one that is written for batches needs "
        "keep_batch_dim=True.",
    ),
    Row(
        lambda: grad(lambda params, x, y: float(jnp.mean(loss(params, x, y))), keep_batch_dim=True),
        TypeError,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[1, 3], float32[1]), with an axis of size 1 for the batch, for keep_batch_dim "
        "is True.",
    ),
    Row(
        lambda: exported_with_symbols(),
        ValueError,
        "the engine lays out its work by the number of samples, got float32[n, 3]; export with "
        "numbers for sizes, or export psc.per_sample_clip of jax.vmap(jax.grad(loss)), which takes "
        "symbolic ones",
    ),
    Row(
        lambda: psc.clipped_grad(loss, 1.0).verify(PARAMS, X[:0], Y[:0]),
        ValueError,
        "verify compares samples, but the batch has none; pass one at least",
    ),
    Row(
        lambda: verified_with_an_axis(),
        ValueError,
        "verify compares one device's samples, but axis_name names mesh axes; verify the same "
        "function without axis_name, outside of jax.shard_map",
    ),
    Row(
        lambda: grad(printing, batch=(X,)),
        ValueError,
        "the loss has effects (OrderedDebug), as of io_callback, an ordered jax.debug.print or a "
        "collective over a mesh axis, which would happen an unknown number of times; take them "
        "out, or return what you want to see as aux",
    ),
    Row(
        lambda: on_four_devices(psc.clipped_grad(of_x, 1.0)),
        ValueError,
        "the loss varies over the mesh axis 'data' of jax.shard_map, but params['b'] does not, so "
        "JAX would sum its gradient over the devices before clipping. For the clipped mean of all "
        "devices' samples pass axis_name='data'; for a separate mean on each device first write "
        "params = jax.lax.⟨pcast, or pvary before JAX 0.8⟩",
    ),
    Row(
        lambda: psc.clipped_grad(normalised, 1.0, keep_batch_dim=True).explain(PARAMS, X),
        UserWarning,
        "the loss of one example takes statistics over a batch axis of size 1, as batch "
        "normalisation in training mode does:\n  ⟨file and line⟩ (normalised)\n  ⟨file and line⟩ "
        "(normalised)\nThe statistics of one sample alone are not those that training with "
        "batches computes; and those of a batch couple its samples, so that per-sample "
        "gradients do not exist. Take group or layer normalisation, or batch normalisation in "
        "evaluation mode (use_running_average=True)",
    ),
    Row(
        closing_over_a_sharded_array,
        ValueError,
        "of arrays on a mesh with Explicit axes gradients are clipped with Auto axes, but the "
        "loss or the threshold closes over some: pass them as arguments (a batch argument that "
        "all samples share has in_axes=None)",
    ),
]
