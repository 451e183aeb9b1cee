"""Define the interface of modes: how they compute a slice's result, and how they explain it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from psclip_optax.engine.explain import Plan, explained
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples
from psclip_optax.engine.plan import Plans


class Course(NamedTuple):
    """Says how a mode processes a batch.

    Attributes:
      num_slices: the number of slices for one pass; None for two passes over the whole batch.
      note: why it cannot process the batch in the usual way.
      plans: the plans that it uses, if not the problem's.
    """

    num_slices: int | None = 1
    note: str = ""
    plans: Plans | None = None


class Mode(abc.ABC):
    """Computes Σ γ_k g_k / N of a batch, or of one slice of it.

    Attributes:
      name: the name that `explain` prints.
    """

    name: str

    @abc.abstractmethod
    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        """Compute the result of a slice, from the leaves of the parameters."""

    def course(self, problem: Problem, leaves: Sequence[Any], num_samples: int) -> Course:
        """Say how it processes `num_samples` samples."""
        del problem, leaves, num_samples
        return Course()

    def explain(
        self, problem: Problem, leaves: Sequence[Any], params: Any, num_samples: int, note: str
    ) -> Plan:
        """Explain each parameter's route and cost; the leaves are those of the tree `params`."""
        course = self.course(problem, leaves, num_samples)
        return explained(
            course.plans or problem.plans,
            params,
            num_samples,
            problem.dtype,
            mode=self.name,
            num_slices=course.num_slices,
            note=note or course.note,
        )
