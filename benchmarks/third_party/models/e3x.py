"""Takes equivariant layers of E3x."""

from __future__ import annotations

import e3x
import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.third_party.building import normal, of_linen, tokens
from benchmarks.third_party.common import Model


class Energy(nn.Module):
    """The energy of atoms, by messages between all of them."""

    @nn.compact
    def __call__(self, positions: jax.Array, kinds: jax.Array) -> jax.Array:
        to, sent = e3x.ops.sparse_pairwise_indices(4)
        basis = e3x.nn.basis(
            positions[sent] - positions[to],
            num=4,
            max_degree=1,
            radial_fn=e3x.nn.reciprocal_bernstein,
            cutoff_fn=e3x.nn.smooth_cutoff,
        )
        x = e3x.nn.Embed(5, 4)(kinds)
        x = e3x.nn.MessagePass()(x, basis, dst_idx=to, src_idx=sent)
        x = e3x.nn.silu(e3x.nn.Dense(4)(x))
        return jnp.sum(e3x.nn.TensorDense(2, max_degree=0)(x))


MODELS = {
    "message passing": Model(lambda: of_linen(Energy(), 0.3 * normal(4, 3), tokens(4, 5))),
}
