"""Find the states of clipping in the state of an optimizer."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from psclip_optax.thresholds import AdaptiveThreshold
from psclip_optax.thresholds.tracking import TrackNormsState
from psclip_optax.transforms import PerSampleClipState
from psclip_optax.typing import PyTree

NodeT = TypeVar("NodeT")
StateT = TypeVar("StateT")


def nodes_of_kind(opt_state: optax.OptState, kind: type[NodeT]) -> list[NodeT]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def clip_states(opt_state: optax.OptState) -> list[PerSampleClipState]:
    """Finds the states of per_sample_clip, without those of their thresholds."""
    # NNX wraps every array of an optimizer's state in a Variable; the leaves are their contents.
    nodes = nodes_of_kind(opt_state, PerSampleClipState)
    return [
        PerSampleClipState(*jax.tree.leaves(node._replace(threshold_state=()))) for node in nodes
    ]


def tracked_state(rule: AdaptiveThreshold[StateT], opt_state: optax.OptState) -> StateT:
    """Finds the state of a rule that `track_norms` stores in the optimizer's state."""
    expected = jax.eval_shape(rule.init)
    tracked = [node.threshold_state for node in nodes_of_kind(opt_state, TrackNormsState)]
    if len(tracked) != 1 or not _are_alike(tracked[0], expected):
        raise ValueError(
            "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
            f"same rule keeps it; this one holds {len(tracked)} TrackNormsState"
            f"{', of another rule' if len(tracked) == 1 else ''}. Write "
            "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has"
        )
    # The leaves are inside NNX's Variables, as in clip_states.
    return jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(tracked))


def _are_alike(state: PyTree, expected: PyTree) -> bool:
    # Structures cannot be compared, because NNX's Variables are part of them.
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(expected)
    return type(state) is type(expected) and [*map(jnp.shape, leaves)] == [*map(jnp.shape, wanted)]


def check_optimizer(opt_state: optax.OptState, stacked: bool) -> None:
    number = len(clip_states(opt_state))
    if stacked and number != 1:
        raise ValueError(
            'gradients="per_sample", which is meant where no threshold is given, has stacked '
            "gradients [n, …] for one per_sample_clip in the optimizer, whose state holds "
            f"{number} PerSampleClipState. For any optimizer pass threshold=… to the step, or "
            "write optax.chain(psclip_optax.track_norms(), …) for the automatic one; or write "
            "optax.chain(psclip_optax.per_sample_clip(threshold), …) or "
            'psclip_optax.ps_clip_sgd(…), or gradients="mean", which clips nothing'
        )
    if not stacked and number:
        raise ValueError(
            'gradients="mean" and "clipped" give the optimizer gradients of the parameters\' own '
            "shapes, but its per_sample_clip would take their first axis for samples. Write "
            'gradients="per_sample", or leave per_sample_clip out of the optimizer'
        )
