"""Define the interface of all modes: how they make a slice's result, and how they explain it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from psclip_optax.engine.explain import Plan, explained
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples
from psclip_optax.engine.plan import Plans


class Course(NamedTuple):
    """The course that a mode takes over a batch.

    Attributes:
      num_slices: over how many slices it makes one pass; None for two passes over all of it.
      note: what keeps it from the course that it would take otherwise.
      plans: those that it follows, if others than the problem's.
    """

    num_slices: int | None = 1
    note: str = ""
    plans: Plans | None = None


class Mode(abc.ABC):
    """A way to Σ γ_k g_k / N of a batch, or of one slice of it.

    Attributes:
      name: as `explain` prints it.
    """

    name: str

    @abc.abstractmethod
    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        """Make the result of a slice, from the leaves of the parameters."""

    def course(self, problem: Problem, leaves: Sequence[Any], num_samples: int) -> Course:
        """Say how it goes over so many samples."""
        del problem, leaves, num_samples
        return Course()

    def explain(
        self, problem: Problem, leaves: Sequence[Any], params: Any, num_samples: int, note: str
    ) -> Plan:
        """Tell what each parameter's gradient takes; the leaves are those of the tree `params`."""
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
