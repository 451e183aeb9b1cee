"""Define the configurations of the commands of `psclip`.

No heavy package is imported here, so `psclip --help` starts at once.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from psclip_optax.training.data.register import DATASETS

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
else:  # the command line offers the registered data sets
    DatasetName = Literal[tuple(DATASETS)]
ModelName: TypeAlias = Literal["mlp", "small_cnn", "alexnet", "resnet18"]
MethodName: TypeAlias = Literal[
    "sgd",
    "momentum",
    "batch-clip",
    "ps-clip",
    "ps-clip-constant",
    "ps-clip-auto",
    "ps-clip-median",
]
ScheduleName: TypeAlias = Literal["cosine", "constant"]
EngineName: TypeAlias = Literal["auto", "one_pass", "two_pass", "vmap"]
ClipAtName: TypeAlias = Literal["sample", "micro-batch", "batch"]
ClipGroupsName: TypeAlias = Literal["all", "layer", "leaf"]

# Fields that may change when a run is resumed, because they do not affect the parameters.
FREE_FIELDS = {
    "out",
    "resume",
    "cache_dir",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "tensorboard",
    "distributed",
    "coordinator",
    "num_processes",
    "process_id",
    "distributed_timeout",
}


def at_least_one() -> Any:
    """Marks a sequence without a default, for which Tyro's help would show an empty one.

    Returns:
      Metadata for `Annotated`.

    Examples:
      >>> at_least_one().help_behavior_hint
      '(at least one)'
    """
    # Imported here: `psclip doctor` has to work without Tyro, which alone evaluates annotations.
    import tyro

    return tyro.conf.arg(help_behavior_hint="(at least one)")


class UsageError(Exception):
    """A command cannot run as requested; the message is one line that says why.

    Examples:
      >>> raise UsageError("--lr: expected a finite number above 0, got -1.0")
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --lr: expected a finite number ...
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A classifier, the shapes of its data, and how its batches are clipped.

    Examples:
      >>> ModelConfig(dataset="cifar10", model="resnet18").batch_size
      64
    """

    dataset: DatasetName = "digits"
    """The data set. digits comes with scikit-learn; CIFAR is downloaded once."""
    model: ModelName = "mlp"
    """The classifier."""
    width: float = 1.0
    """Multiplies the classifier's hidden sizes and channels."""
    dropout: float = 0.0
    """Dropout rate in [0, 1)."""
    batch_size: int = 64
    """Samples in a batch."""
    engine: EngineName = "auto"
    """The mode of clipping samples: vmap stacks their gradients, for reference; others don't."""
    accumulate: int = 1
    """Number of micro-batches in each batch, processed one after the other."""
    clip_at: ClipAtName = "sample"
    """Clip each sample's gradient, each micro-batch's mean, or the batch's mean, by ps-clip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(ModelConfig):
    """The task: all options that the methods have in common.

    Examples:
      >>> TaskConfig(dataset="cifar10", model="resnet18").schedule
      'cosine'
    """

    data_dir: pathlib.Path | None = None
    """Folder with an existing copy of CIFAR in its official layout."""
    cache_dir: pathlib.Path | None = None
    """Folder for downloads; by default the user's cache folder."""
    momentum: float = 0.9
    """Decay of the momentum, for every method but sgd."""
    schedule: ScheduleName = "cosine"
    """Schedule of the learning rate: a cosine decay to 0, or constant."""
    beta: float = 1.5
    """β of the k-th sample's threshold α k^(1/β); for ps-clip-auto also the moment's order."""
    label_noise: float = 0.0
    """Share of the training labels replaced by other labels."""
    pixel_df: float | None = None
    """Degrees of freedom of the Student-t factor that multiplies each training image."""
    augment: bool = False
    """Crop the training images at random and flip half of them."""
    seed: int = 0
    """Seed of the initial parameters, the corruption, the sample order and the dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(TaskConfig):
    """Train one model with one method; write configuration, metrics and checkpoints.

    Examples:
      >>> TrainConfig(method="ps-clip", lr=0.05, alpha=2.0).steps
      1000
    """

    method: MethodName = "ps-clip"
    """The optimizer. ps-clip… clips each sample's gradient (-auto finds α), batch-clip the mean."""
    lr: float = 0.05
    """Learning rate."""
    alpha: float | None = None
    """α of the threshold. Without it ps-clip is ps-clip-median, and other methods use α = 1."""
    clip_groups: ClipGroupsName = "all"
    """Clip by one norm over all parameters, one for each layer, or one for each array."""
    steps: int = 1000
    """Updates to make."""
    eval_every: int = 100
    """Steps between two evaluations on the test set."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the last three are kept."""
    log_every: int = 10
    """Steps between two lines in metrics.jsonl."""
    out: pathlib.Path = pathlib.Path("run")
    """Folder for the configuration, the metrics and the checkpoints."""
    resume: bool = False
    """Continue from the last checkpoint in the folder."""
    record_samples: bool = False
    """Write each sample's loss, norm and scale in each step to samples/, for psclip outliers."""
    tensorboard: bool = False
    """Also write the records of metrics.jsonl for TensorBoard, to the folder's tensorboard/."""
    distributed: bool = False
    """Train on all devices of several processes, each started with the same flags."""
    coordinator: str | None = None
    """HOST:PORT at which the first process listens; detected on a cluster by default."""
    num_processes: int | None = None
    """Number of processes; detected on a cluster by default."""
    process_id: int | None = None
    """Index of this process, from 0; detected on a cluster by default."""
    distributed_timeout: int = 300
    """Seconds until a process that does not start or respond ends the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(TaskConfig):
    """Compare momentum SGD, batch clipping and per-sample clipping, tuned on grids of equal size.

    Examples:
      >>> config = CompareConfig(dataset="cifar100", model="alexnet", steps=4000)
      >>> config.num_seeds, config.label_noise
      (5, 0.2)
    """

    width: float = 0.5
    label_noise: float = 0.2
    pixel_df: float | None = 1.5
    steps: int = 300
    """Updates of each run."""
    num_seeds: int = 5
    """Final runs of each method, at least 3."""
    eval_every: int = 20
    """Steps between two evaluations on the test set."""
    validation_share: float = 0.2
    """Share of the training set held out for tuning."""
    momentum_learning_rates: tuple[float, ...] = (
        0.0005,
        0.001,
        0.002,
        0.005,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
    )
    """Learning rates to tune over for momentum SGD and for clipping at a running median."""
    batch_clip_learning_rates: tuple[float, ...] = (0.02, 0.1, 0.5)
    """Learning rates to tune over for batch clipping."""
    batch_clip_thresholds: tuple[float, ...] = (0.003, 0.03, 0.3)
    """Its thresholds, relative to the initial norm of a batch's mean gradient."""
    ps_clip_learning_rates: tuple[float, ...] = (0.02, 0.1, 0.5)
    """Learning rates to tune over for per-sample clipping."""
    ps_clip_thresholds: tuple[float, ...] = (0.003, 0.03, 0.3)
    """Its thresholds α, relative to the initial median norm of a sample's gradient."""
    out: pathlib.Path = pathlib.Path("compare")
    """Folder for compare.json and compare.png."""
    overwrite: bool = False
    """Replace an existing result in the folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig(ModelConfig):
    """Print how each parameter's per-sample gradients are clipped, what it costs, and why.

    Examples:
      >>> ExplainConfig(model="small_cnn", engine="two_pass").dataset
      'digits'
    """

    clip_at: Literal["sample", "micro-batch"] = "sample"
    """Clip each sample's gradient, or each micro-batch's mean."""
    clip_groups: ClipGroupsName = "all"
    """Clip by one norm over all parameters, one for each layer, or one for each array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the curves and the norms of runs, finished or not, into one figure.

    Examples:
      >>> PlotConfig(runs=(pathlib.Path("run"),)).out.name
      'plot.png'
    """

    runs: Annotated[tuple[pathlib.Path, ...], at_least_one()]
    """Folders written by psclip train or compare; comparisons show means over seeds."""
    out: pathlib.Path = pathlib.Path("plot.png")
    """The figure, a PNG; an existing file is replaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutliersConfig:
    """Show the samples that were clipped most in a run trained with --record-samples.

    Examples:
      >>> OutliersConfig(run=pathlib.Path("run")).by
      'scale'
    """

    run: pathlib.Path
    """Folder written by psclip train --record-samples; the run may still be in progress."""
    by: Literal["scale", "norm", "loss"] = "scale"
    """Rank by the smallest mean scale, the largest median norm, or the largest mean loss."""
    top: int = 100
    """Number of pictures to show, at most 400."""
    out: pathlib.Path | None = None
    """Folder for two tables, a page and a PNG; by default outliers/ in the run's folder."""
    overwrite: bool = False
    """Replace an existing result in the folder."""
    data_dir: pathlib.Path | None = None
    """Folder with an existing copy of CIFAR; by default that of the run."""
    cache_dir: pathlib.Path | None = None
    """Folder for downloads; by default that of the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Print versions and devices, and check that clipping is correct and fast on this machine.

    Ends with status 0 if all checks pass, and 1 if numbers are wrong or a route is slow.

    Examples:
      >>> DoctorConfig().cache_dir is None
      True
    """

    cache_dir: pathlib.Path | None = None
    """Folder for downloads to check; by default the user's cache folder."""


Config: TypeAlias = (
    TrainConfig | CompareConfig | PlotConfig | ExplainConfig | OutliersConfig | DoctorConfig
)
