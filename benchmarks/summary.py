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
    budgets_report,
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

- `NAME.json`, `NAME.png`: results and figure of `python -m benchmarks.FOLDER.NAME`.
- `engine.json`, `engine.png`: of `benchmarks.engine.cost`. `third_party.json`: of
  `.ci/third_party`.
- `NAME.runs.jsonl`: a comparison's finished runs, one a line; its command trains missing runs.
- Machines: one NVIDIA H200 for alexnet_cifar100, two cores of an AMD EPYC for all else.
- `python -m benchmarks.summary` writes this page from the JSON files beside it.

Each section names its command and the machine. Intervals are 95 % intervals.
"""


class Section(NamedTuple):
    """Describes the section of one benchmark on the page.

    Attributes:
      module: the module of the benchmark; its last part names the JSON file and the figure.
      title: a question.
      body: a function from the result to Markdown.
      command: the command, if it is not `python -m benchmarks.MODULE`.
      has_figure: whether there is a figure.
    """

    module: str
    title: str
    body: Any
    command: str | None = None
    has_figure: bool = True


def estimator(result: dict[str, Any]) -> str:
    bullets = "".join(f"- {line}\n" for line in result["summary"])
    return f"""Gradients have dimension 10, and the noise has an exactly known tail index a. α = σ
from the raw moment, β = p = a − 0.1 (2 for the Gaussian), n = 2⁸ to 2¹⁴. The slope is that of the
RMS error over n. The 99 % errors and the growth are at n = 4,096; the growth is the error exceeded
with probability 10⁻⁴ relative to that exceeded with probability 0.1.

{estimator_report.to_markdown(result).strip()}

The error always stays within the theory's guarantee. Its high quantiles grow as powers of log(1/δ);
those of the plain mean grow as powers of 1/δ. The growing threshold beats the constant one under
every heavy tail. Under Gaussian noise, the control, clipping changes nothing. The clipped mean is
not the best robust mean: a median of means has smaller 99 % errors under nearly all of these
distributions. For a = 1.9 the slope over these n is flatter than the bound's.

{bullets}"""


def convergence(result: dict[str, Any]) -> str:
    return f"""Two smooth non-convex problems have a known ∇F: Geman–McClure regression with
additive noise in 8 dimensions, and a teacher–student network of tanh units with label noise. The
noise has the tail index p + 0.1. ‖∇F‖ is averaged over the steps of a run. Slopes are those of its
mean and its 99 % quantile over 5,000 runs, against the number of samples N = nT. n, T, η = 1/L, α =
σ̂ and β = p follow the theory, whose bound is −(p − 1)/(3p − 2). Ratios are those of PS-Clip-SGD to
another method at N = 4,096, each tuned on 50 points with other seeds: below 1, PS-Clip-SGD is
better.

{convergence_report.to_markdown(result)}
- In the regression the slope is at the bound or near it. In the network the slope of the mean is
  flatter up to these N. There the slope of plain SGD under Gaussian noise is also flatter than its
  bound.
- Under heavy tails PS-Clip-SGD is always better than SGD, global clipping and normalised SGD, most
  of all in the 99 % quantile.
- This is due to clipping samples, not to the growing threshold: a tuned constant threshold is as
  good or up to 4 % better, and a running quantile much better under symmetric noise.
- Under Gaussian noise, the control, tuned PS-Clip-SGD is within 1 % of SGD: equal in the
  regression, slightly worse in the network.
"""


def automatic_in_theory(result: dict[str, Any]) -> str:
    plan = result["plan"]
    sizes, descent = plan["sizes"], plan["descent"]
    runs, points = descent["runs"], math.prod(descent["grid"])
    return f"""The noise and the problems are those of the two sections above.
`psc.auto_threshold()` knows neither α nor β. The first table has its error relative to that of the
oracle, the growing threshold with α = σ and β = p, in the same {plan["trials"]:,} trials: above 1,
the automatic threshold is worse. It has seen either {plan["warm_up"]} batches before the trials,
or none. "Rescaled" multiplies all estimates of a method by its best factor, which is never below 0,
as a tuned learning rate would. The second table has ratios of ‖∇F‖ over {runs:,} runs at
N = {descent["tuned_sizes"][-1]:,}, mean and 99 % quantile. Each method is tuned on {points} points
with other runs, the automatic threshold on as many learning rates: below 1, it is better.

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
Momentum is 0.9, except for SGD. Thresholds are constant, τ; growing, α √k; or automatic,
scale · σ̂ k^(2/3) with the running raw moment σ̂ of order 1.5 (`psc.moment_threshold`, not
`psc.auto_threshold`). The data are clean; or 20 % or 40 % of the labels are replaced by others; or
a fifth of the images is multiplied by Student-t factors with 1.5 degrees of freedom.

Test accuracy after the last epoch, in %, mean ± standard error, and the tail index of the samples'
gradient norms in that epoch, under the growing threshold:

{alexnet_report.to_markdown(result)}
Per-sample clipping against each baseline, in points, paired by seed, after the last epoch or
stopped early at the epoch of the best validation accuracy:

{alexnet_report.differences_to_markdown(result)}
Trials that ended below 1.5 % validation accuracy, where 1 % is chance:

{alexnet_report.failures_to_markdown(result)}
Tails of the norms during training, Hill's estimates by `psc.tails`:

{alexnet_report.tails_to_markdown(result)}
- Is the noise so heavy-tailed that p < 2? Not on CIFAR-100, clean or with wrong labels: no estimate
  of the index is below 7, so the variance is finite and SGD's rate is optimal. With heavy pixels it
  is.
- With heavy pixels, methods that do not clip diverge at every learning rate of their grids, and
  per-sample clipping is level with batch clipping or above it.
- On the other data, after the last epoch, no per-sample threshold is significantly above the best
  tuned baseline. With wrong labels they are above momentum SGD and batch clipping, which learn
  these labels in the end; SGD without momentum does not learn them either.
- With 40 % wrong labels and early stopping, the constant threshold is above every baseline.
- A constant or growing per-sample threshold hardly ever fails at any learning rate of the grid.
- The automatic threshold at the scales of this grid is the weakest of the three: a scale of 1 is
  the theory's, and clips almost nothing at n = 128.
- Nearly all winners have the largest threshold of their grids (the command prints which): wider
  grids may do better.
"""


def clipping(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    width, seeds = (protocol[name] for name in ("width", "seeds"))
    trials = number_of_trials(result["rows"], "heavy pixels and momentum")
    return f"""AlexNet of width {width:g} on CIFAR-100, {len(result["rows"])} conditions around one
setting. Each method has the same number of trials of half the length (learning rate × threshold:
{trials}). The best is tested with {seeds} other seeds. The table has the test accuracy in %, mean ±
standard error, and the differences of the growing threshold, paired by seed. n is the batch size,
and 1 % is chance. Such small nets and short runs show under which conditions methods differ, rather
than by how much.

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


def budgets(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    names = ("width", "batch_size", "trials", "seeds")
    width, batch, trials, seeds = (protocol[name] for name in names)
    return f"""AlexNet of width {width:g} on CIFAR-100, n = {batch}, momentum 0.9 or AdamW, cosine
schedule over the budget. At each budget each method has at most {trials} trials of the full length,
each with one seed. The best by validation accuracy is tested with {seeds} other seeds. Trials start
from the winner of a condition before, and go on to neighbours of the best so far, a factor of 2
away in the learning rate and √10 in the threshold, or less where none of these is better.
{budgets_report.NOTE}

{budgets_report.to_markdown(result)}
{bulleted(budgets_report.sentences(result))}"""


def accumulation(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    width, epochs, seeds = (protocol[name] for name in ("width", "epochs", "seeds"))
    trials = number_of_trials(result["rows"], "heavy pixels")
    return f"""AlexNet of width {width:g} on CIFAR-100, {epochs} epochs, K micro-batches of 32
images a step, momentum 0.9. Each method has the same number of trials of half the length
(learning rate × threshold: {trials}). The best is tested with {seeds} other seeds: test accuracy in
%, mean ± standard error. "Before" clips the micro-batches' mean gradients at τ_j = α √j; "after"
clips their mean. Such short runs, with so few trials, show how training starts, not how it ends.
1 % is chance.

{accumulation_cifar100.to_markdown(result)}
By the intervals, clipping before is

{verdicts(result, accumulation_cifar100.METHODS[:2])}"""


def sweep(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    names = ("width", "batch_size", "epochs", "rates", "seeds")
    width, batch, epochs, rates, seeds = (protocol[name] for name in names)
    return f"""AlexNet of width {width:g} on CIFAR-100, {epochs} epochs, n = {batch}, momentum 0.9,
τ_k = α √k. Each α is tuned separately, over {rates} learning rates with trials of half the length.
The best is tested with {seeds} other seeds: test accuracy in %, mean ± standard error, and the
difference to no clipping, paired by seed. The share is that of clipped samples in the last epoch.

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
Samples are ranked by mean scale, median norm or mean loss over the epochs so far.
The table has the area under the ROC curve, which is the probability in % that a wrong label ranks
before a right one, and the share of wrong labels among the first 10 %: means over seeds (95 %
intervals). Without clipping all scales are 1 and rank nothing. Test accuracy in %, mean ± standard
error: {accuracies}. Such a small net fits few of the images, with right or wrong labels.

{find_bad_data.to_markdown(result)}
{verdicts}"""


def groups(result: dict[str, Any]) -> str:
    told = {row["task"]: row["described"] for row in result["rows"]}
    net, text, seeds = told["AlexNet"], told["GPT"], result["protocol"]["seeds"]
    return f"""AlexNet of width {net["width"]:g} is trained with momentum SGD, {net["steps"]} steps
with {net["batch_size"]} images of CIFAR-100, with the noises above. A GPT of {text["layers"]}
blocks and width {text["dim"]} is trained with AdamW, {text["steps"]} steps with
{text["batch_size"]} windows of the {text["characters"]:,} characters of the topics of Python's
`help`. Constant thresholds, one for the whole gradient or one for each layer by `psc.by_layer`,
have six trials each (learning rate × threshold). The automatic threshold, for the whole gradient or
for each layer, has three learning rates each. Trials have half the length; the best are tested with
{seeds} other seeds. The table has the test accuracy in % (for the GPT, the share of characters
predicted correctly), mean ± standard error, and differences paired by seed. Such short runs show
how training starts, not how it ends.
{by_layer_report.to_markdown(result)}
{bulleted(by_layer_report.sentences(result))}"""


def automatic(result: dict[str, Any]) -> str:
    rows, protocol = result["rows"], result["protocol"]
    number = {
        held: sum(row["cell"]["is_held_out"] == held for row in rows) for held in (False, True)
    }
    return f"""Nets with a hidden layer of {protocol["hidden"]} units are trained from
{protocol["seeds"]} seeds on digits, regressions, characters of Python's `help` with Student-t
factors on the losses, and a policy with Student-t noise on the returns. `psc.auto_threshold()` was
chosen on {number[False]} of the conditions; the other {number[True]} are held out. Every method is
tuned over the same five learning rates; batch clipping and the fixed threshold also over four and
five thresholds. {auto_report.NOTE}

{auto_report.conditions_to_markdown(result)}
{bulleted(auto_report.sentences(result))}
For all methods: the mean and the worst difference to the best tuned method in each group, in how
many conditions the aim is met, open or missed, and the number of failures.

{auto_report.rules_to_markdown(result)}
- No candidate without failures is better than the automatic threshold in both groups on which it
  was chosen. Candidates that clip less are closer to no clipping for Gaussian errors, but fail with
  wrong labels at high learning rates.
- The candidate that balances bias and variance clips next to nothing, and fails under heavy tails:
  its bound on the bias assumes one-sided errors, the worst case.
- Under heavy pixels and with n ≥ 128 a tuned fixed threshold is below tuned batch clipping as well.
"""


def other_libraries(result: dict[str, Any]) -> str:
    found = result["summary"]
    outcomes, errors = found["outcomes"], found["largest_error"]
    failed = outcomes.get("failed", 0)
    return f"""{found["models"]} tiny models of {found["libraries"]} libraries. Each library has a
separate environment, with the newest JAX that it supports; exceptions are listed below. The
threshold is the median of the norms, so half of the samples are clipped. Errors are relative to
`vmap(grad)` in the same dtype, the larger of the modes "one_pass" and "two_pass": of the samples'
norms, and of the clipped mean relative to the largest entry of each leaf. "Routes" are shares of
the parameters. "float32" marks libraries that compute in float32 whatever their inputs.

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
        "How far is the automatic threshold from the theory's?",
        automatic_in_theory,
    ),
    Section("cifar100.alexnet_cifar100", "Does it train AlexNet on CIFAR-100 better?", training),
    Section(
        "cifar100.clipping_map", "Under which conditions does per-sample clipping win?", clipping
    ),
    Section("cifar100.threshold_sweep", "How much does the threshold matter?", sweep),
    Section("cifar100.budgets", "Does per-sample clipping train faster?", budgets),
    Section(
        "cifar100.accumulation_cifar100",
        "Clip micro-batches before they are accumulated, after, or not at all?",
        accumulation,
    ),
    Section("cifar100.find_bad_data", "Do the most clipped samples have wrong labels?", bad_data),
    Section(
        "thresholds.auto_threshold",
        "Does the automatic threshold train as well as a tuned one?",
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
