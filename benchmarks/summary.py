"""Writes one page with the results of the benchmarks of theory and training.

    python -m benchmarks.summary

Writes benchmarks/results/README.md from the JSON files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tyro

from benchmarks import headlines
from benchmarks.cifar100 import (
    accumulation_cifar100,
    alexnet_report,
    clipping_map,
    find_bad_data,
    threshold_sweep,
    tuned,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS
from benchmarks.common.statistics import describe_mean
from benchmarks.theory import automatic_report, convergence_report, estimator_report
from benchmarks.third_party import report as third_party
from benchmarks.thresholds import auto_report, by_layer_report

TITLE = "# What the benchmarks found\n"
HOW_TO_READ = """## How to read this page

- `NAME.json` and `NAME.png`: what was found and its figure, by `python -m benchmarks.FOLDER.NAME`.
- `engine.json` and `.png`: by `benchmarks.engine.cost`; `third_party.json`: by `.ci/third_party`.
- `NAME.runs.jsonl`: a comparison's finished runs, one a line; its command trains those it lacks.
- Machines: one NVIDIA H200 for alexnet_cifar100, two cores of an AMD EPYC for all else.
- This page: by `python -m benchmarks.summary`, from the JSON files beside it.

Each section names the command that made its file, and the machine. Intervals are of 95 %.
"""


class Section(NamedTuple):
    """The section of one benchmark on the page.

    Attributes:
      module: the module of the benchmark; its last part names the JSON file and the figure.
      title: a question.
      body: a function from the result to Markdown.
      command: the command where it is not `python -m benchmarks.MODULE`.
      has_figure: whether there is a figure.
    """

    module: str
    title: str
    body: Any
    command: str | None = None
    has_figure: bool = True


def estimator(result: dict[str, Any]) -> str:
    bullets = "".join(f"- {line}\n" for line in result["summary"])
    return f"""Gradients in dimension 10, noise of exactly known tail index a, α = σ from the raw
moment, β = p = a − 0.1 (2 for the Gaussian), n = 2⁸ to 2¹⁴. The slope is of the RMS error over n;
the 99 % errors and the growth of the error, from the one exceeded with probability 0.1 to that with
10⁻⁴, are at n = 4,096.

{estimator_report.to_markdown(result).strip()}

The error never leaves what the theory guarantees, its high quantiles grow as powers of log(1/δ)
where the plain mean's grow as powers of 1/δ, and the growing threshold beats the constant one under
every heavy tail. Under Gaussian noise, the control, clipping changes nothing. It is not the best
robust mean there is: a median of means has smaller 99 % errors under nearly all of these laws. For
a = 1.9 the slope over these n is flatter than the bound's.

{bullets}"""


def convergence(result: dict[str, Any]) -> str:
    return f"""Two smooth non-convex problems of known ∇F: Geman–McClure regression with additive
noise in 8 dimensions, and a teacher–student network of tanh units with label noise. The noise has
the tail index p + 0.1. Slopes are of the mean of ‖∇F‖ over the steps and over 5,000 runs, and of
its 99 % quantile, over the samples N = nT, with n, T, η = 1/L, α = σ̂ and β = p as the theory has
them; the bound is −(p − 1)/(3p − 2). Ratios, of the mean and of the 99 % quantile, are of
PS-Clip-SGD to another method at N = 4,096, each tuned on 50 points by other seeds: below 1
PS-Clip-SGD is better.

{convergence_report.to_markdown(result)}
- In the regression the slope is at the bound or near it. In the network the mean's is flatter up to
  these N; plain SGD's is flatter than its own bound there too, under Gaussian noise.
- Under heavy tails PS-Clip-SGD is better than SGD, global clipping and normalised SGD, always, and
  most in the 99 % quantile.
- That is the merit of clipping samples, not of the growing threshold: a tuned constant one is as
  good or up to 4 % better, and a running quantile much better under symmetric noise.
- Under Gaussian noise, the control, tuned PS-Clip-SGD is within 1 % of SGD: equal in the
  regression, slightly worse in the network.
"""


def automatic_in_theory(result: dict[str, Any]) -> str:
    plan = result["plan"]
    sizes, descent = plan["sizes"], plan["descent"]
    runs, points = descent["runs"], math.prod(descent["grid"])
    return f"""The noise and the problems are those of the two sections above.
`psc.auto_threshold()` knows neither α nor β. Each cell of the first table is its error as a ratio
to that of the growing threshold with α = σ and β = p, the oracle, in the same {plan["trials"]:,}
trials: above 1 the automatic threshold is worse. It has seen {plan["warm_up"]} batches before, and
each trial is its next one; or it has seen none. Rescaled: all estimates times one factor, the best
of its kind, as by a tuned learning rate, which is never below 0. The second table has ratios of
‖∇F‖ over {runs:,} runs at N = {descent["tuned_sizes"][-1]:,}, mean and 99 % quantile, each method
tuned on {points} points by other runs, the automatic one on as many learning rates: below 1 it is
better.

{automatic_report.errors_to_markdown(result, sizes[0], sizes[-1])}
{automatic_report.ratios_to_markdown(result)}
{bulleted(automatic_report.sentences(result))}"""


def bulleted(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}.\n" for sentence in sentences)


def training(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    batch, dtype, seeds = (protocol[name] for name in ("batch_size", "dtype", "seeds"))
    short, long = protocol["tuning_epochs"], protocol["epochs"]
    return f"""AlexNet of width {protocol["width"]:g}, batches of {batch}, images shifted and
mirrored, cosine schedule, {dtype}. Every method has 12 trials of {short} epochs on 45,000 images;
the best by accuracy on the other 5,000 is trained for {long} epochs from {seeds} other seeds.
Momentum is 0.9 but for SGD. Thresholds: constant τ; growing α √k; automatic, scale · σ̂ k^(2/3) with
the running raw moment of order 1.5. The data are clean; or 20 % or 40 % of the labels are replaced
by others; or a fifth of the images is multiplied by Student-t factors with 1.5 degrees of freedom.

Test accuracy after the last epoch, in %, mean ± standard error, and the tail index of the samples'
gradient norms in it, under the growing threshold:

{alexnet_report.to_markdown(result)}
Per-sample clipping against each baseline, in points, paired by seed, after the last epoch or
stopped early at the epoch of the best validation accuracy:

{alexnet_report.differences_to_markdown(result)}
Trials that ended below 1.5 % validation accuracy, where 1 % is chance:

{alexnet_report.failures_to_markdown(result)}
Tails of the norms during training, Hill's estimates by `psc.tails`:

{alexnet_report.tails_to_markdown(result)}
- Does the assumption p < 2 hold? Not on CIFAR-100, clean or with wrong labels: no estimate of the
  index is below 7, so that the variance is finite and SGD's rate optimal. With heavy pixels it
  does.
- Where it holds, methods that do not clip diverge at every learning rate of their grids, and
  per-sample clipping is level with batch clipping or above it.
- Where it does not, and the last epoch counts, no per-sample threshold is above the best tuned
  baseline by more than its interval. With wrong labels they are above momentum SGD and batch
  clipping, which go on to learn these labels; SGD without momentum does not either.
- Stopped early, with 40 % wrong labels, the constant threshold is above every baseline.
- A given per-sample threshold nearly never fails, whatever the learning rate of the grid.
- The automatic threshold at the scales of this grid is the weakest of the three: a scale of 1 is
  the theory's, and clips almost nothing at n = 128.
- Nearly all winners lie at the largest threshold of their grids (the command prints which): wider
  grids may do better.
"""


def clipping(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    width, seeds = (protocol[name] for name in ("width", "seeds"))
    trials = number_of_trials(result["rows"], "heavy pixels and momentum")
    return f"""AlexNet of width {width:g} on CIFAR-100 around one setting, {len(result["rows"])}
conditions. Each method has as many trials of half the length (learning rate × threshold: {trials}),
the best of which is tested with {seeds} other seeds: test accuracy in %, mean ± standard error, and
the differences of the growing threshold, paired by seed. n is the batch size. 1 % is chance. Nets
as small and runs as short as these say where differences lie more than how large they are.

{clipping_map.to_markdown(result)}
By the intervals, per-sample clipping is

{verdicts(result, clipping_map.METHODS[:2])}"""


def verdicts(result: dict[str, Any], names: Sequence[str]) -> str:
    """Lists for each method where ours is above it, below it, or neither."""
    return "".join(
        f"- {word.capitalize()} {name}: {'; '.join(labels)}.\n"
        for name in names
        for word, labels in tuned.verdicts(result, name).items()
        if labels
    )


def number_of_trials(rows: list[dict[str, Any]], most_with: str) -> str:
    fewest, most = (f(row["trials"] for row in rows) for f in (min, max))
    return f"{fewest} trials" + (f", {most} with {most_with}" if most > fewest else "")


def accumulation(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    width, epochs, seeds = (protocol[name] for name in ("width", "epochs", "seeds"))
    trials = number_of_trials(result["rows"], "heavy pixels")
    return f"""AlexNet of width {width:g} on CIFAR-100, {epochs} epochs, K micro-batches of 32
images a step, momentum 0.9. Each way has as many trials of half the length (learning rate ×
threshold: {trials}), the best of which is tested with {seeds} other seeds: test accuracy in %,
mean ± standard error. Before: τ_j = α √j of the micro-batches' mean gradients; after: their mean is
clipped. Runs as short as these, with so few trials, say how training starts, not how it ends. 1 %
is chance.

{accumulation_cifar100.to_markdown(result)}
By the intervals, clipping before is

{verdicts(result, accumulation_cifar100.METHODS[:2])}"""


def sweep(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    names = ("width", "batch_size", "epochs", "rates", "seeds")
    width, batch, epochs, rates, seeds = (protocol[name] for name in names)
    return f"""AlexNet of width {width:g} on CIFAR-100, {epochs} epochs, n = {batch}, momentum 0.9,
τ_k = α √k. Each α is tuned alone, over {rates} learning rates by trials of half the length, and the
best is tested with {seeds} other seeds: test accuracy in %, mean ± standard error, and the
difference to no clipping, paired by seed. The share is of the samples of the last epoch, clipped.

{threshold_sweep.to_markdown(result)}"""


def bad_data(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    names = ("width", "epochs", "seeds", "batch_size", "noise")
    width, epochs, seeds, batch, noise = (protocol[name] for name in names)
    accuracies = "; ".join(
        f"{row['method']} {describe_mean(row['test_accuracies'])}" for row in result["rows"]
    )
    verdicts = "".join(f"- {find_bad_data.verdict(row)}\n" for row in result["rows"])
    return f"""AlexNet of width {width:g} on CIFAR-100, {epochs} epochs, n = {batch}, momentum 0.9,
{100 * noise:.0f} % of the labels replaced by others; {seeds} seeds of noise, parameters and order.
Samples are ranked by mean scale, median norm or mean loss over the epochs so far. Area under the
ROC curve of finding the wrong labels, which is the probability in % that a wrong label comes before
a right one, and the share of wrong labels among the first 10 %: means over seeds (95 % intervals).
Without clipping all scales are 1, which is no order. Test accuracy in %, mean ± standard error:
{accuracies}. So small a net fits few of the images, right or wrong.

{find_bad_data.to_markdown(result)}
{verdicts}"""


def groups(result: dict[str, Any]) -> str:
    told = {row["task"]: row["described"] for row in result["rows"]}
    net, text, seeds = told["AlexNet"], told["GPT"], result["protocol"]["seeds"]
    return f"""AlexNet of width {net["width"]:g} with momentum SGD, {net["steps"]} steps with
{net["batch_size"]} images of CIFAR-100, under noises as above; and a GPT of {text["layers"]} blocks
and width {text["dim"]} with AdamW, {text["steps"]} steps with {text["batch_size"]} windows of the
{text["characters"]:,} characters of the topics that Python's `help` explains. Thresholds: constant,
one for the whole gradient or shared out by `psc.by_layer`, six trials each (learning rate ×
threshold); and the automatic one, for all or for each layer, three learning rates each. Trials
have half the length; the best are tested with {seeds} other seeds: test accuracy in %, of the GPT
the share of characters that are named rightly, mean ± standard error, and differences paired by
seed. Runs as short as these say how training starts, not how it ends.

{by_layer_report.to_markdown(result)}
{bulleted(by_layer_report.sentences(result))}"""


def automatic(result: dict[str, Any]) -> str:
    rows, protocol = result["rows"], result["protocol"]
    number = {
        held: sum(row["cell"]["is_held_out"] == held for row in rows) for held in (False, True)
    }
    return f"""Nets with a hidden layer of {protocol["hidden"]} units, {protocol["seeds"]} seeds, on
digits, regressions, characters of Python's `help` with Student-t factors of the losses, and a
policy with Student-t noise of the returns. `psc.auto_threshold()` was chosen on {number[False]} of
the conditions; the other {number[True]} are held out. Every method has the same five learning
rates, those of no clipping; batch clipping and the fixed threshold have four and five thresholds as
well. {auto_report.NOTE}

{auto_report.conditions_to_markdown(result)}
{bulleted(auto_report.sentences(result))}
All methods: mean and worst difference to the best tuned one in each group; in how many conditions
the aim is met, open, missed; and failures.

{auto_report.rules_to_markdown(result)}
- No candidate is above the automatic threshold in both groups that it was chosen on without a
  failure in them. Those that clip less are nearer to no clipping where errors are Gaussian, and
  fail with wrong labels at high learning rates.
- The candidate that weighs bias against variance clips next to nothing, and fails where tails are
  heavy: its bound on the bias holds for errors to one side, which is the worst case.
- Under heavy pixels and with n ≥ 128 a tuned fixed threshold is below tuned batch clipping as well.
"""


def other_libraries(result: dict[str, Any]) -> str:
    found = result["summary"]
    outcomes, errors = found["outcomes"], found["largest_error"]
    failed = outcomes.get("failed", 0)
    return f"""{found["models"]} tiny models of {found["libraries"]} libraries, each library in an
environment of its own with the newest JAX that it admits, if no reason is given below. The
threshold is the median of the norms, so that half of the samples are clipped. Errors are the larger
of the modes "one_pass" and "two_pass", against `vmap(grad)` in the same dtype: of the samples'
norms, and of the clipped mean relative to the largest entry of each leaf. Routes are shares of the
parameters. float32 stands where a library computes in it whatever it is given.

- {outcomes.get("ok", 0)} agree, to {errors["float64"]:.0e} in float64 and {errors["float32"]:.0e}
  in float32; {outcomes.get("wrong", 0)} are wrong, {failed} raise.
{third_party.exceptions(result["libraries"])}
{third_party.to_markdown(result["libraries"])}"""


SECTIONS = (
    Section(
        "theory.estimator_error",
        "Does the clipped mean's error fall as the theory says?",
        estimator,
    ),
    Section(
        "theory.convergence_rate", "Does PS-Clip-SGD converge at the optimal rate?", convergence
    ),
    Section(
        "theory.automatic_theory",
        "How far from the theory's threshold is one that nobody chose?",
        automatic_in_theory,
    ),
    Section("cifar100.alexnet_cifar100", "Does it train AlexNet on CIFAR-100 better?", training),
    Section(
        "cifar100.clipping_map", "Under which conditions does per-sample clipping win?", clipping
    ),
    Section("cifar100.threshold_sweep", "How much does the threshold matter?", sweep),
    Section(
        "cifar100.accumulation_cifar100",
        "Clip micro-batches before they are accumulated, after, or not at all?",
        accumulation,
    ),
    Section("cifar100.find_bad_data", "Does what is clipped most have a wrong label?", bad_data),
    Section(
        "thresholds.auto_threshold",
        "Does a threshold that nobody chose train as well as a tuned one?",
        automatic,
    ),
    Section(
        "thresholds.by_layer",
        "Does a threshold for each layer train as well as one for all?",
        groups,
    ),
    Section(
        "third_party",
        "Does the engine agree with vmap(grad) on the models of other libraries?",
        other_libraries,
        command=".ci/third_party",
        has_figure=False,
    ),
)


def page() -> str:
    return "\n".join([TITLE, headlines.five_lines(), HOW_TO_READ, *map(rendered, SECTIONS)])


def rendered(section: Section) -> str:
    name = section.module.rpartition(".")[2]
    result = headlines.read(name)
    command = section.command or f"python -m benchmarks.{section.module}"
    figure = f"![Figure of benchmarks.{section.module}]({name}.png)\n\n"
    return f"""## {section.title}

`{command}`; {describe(result["machine"])}.

{figure if section.has_figure else ""}{section.body(result).strip()}
"""


def main() -> None:
    """Writes the results of the benchmarks to benchmarks/results/README.md."""
    (RESULTS / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
