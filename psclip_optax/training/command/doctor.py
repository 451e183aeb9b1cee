"""Report versions and known problems, and check the numbers: `psclip doctor`.

This module imports only what the library imports, so it works without the extras.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import psclip_optax
from psclip_optax.clipped_grad import ClippedValueAndGrad, clipped_value_and_grad
from psclip_optax.options import Mode
from psclip_optax.training.config.commands import DoctorConfig

NEWEST_TESTED_JAX = "0.11.2"
_CORE = ("jax", "jaxlib", "optax", "scipy", "numpy")
_NUM_SAMPLES = 8
_MODES = ("one_pass", "two_pass")
_ROUTES = {"convolution": "conv", "embedding": "embedding", "kernel": "dense"}
# Switches that make JAX's programs slow, or different from those of the tests.
_SWITCHES = {
    "jax_enable_x64": "data without a dtype are float64: twice the memory, and slow on most GPUs",
    "jax_disable_jit": "nothing is compiled: everything is slow",
    "jax_disable_most_optimizations": "programs are compiled to be slow",
    "jax_debug_nans": "a sample that is not finite ends the program instead of being dropped",
}
_VARIABLES = {
    "XLA_FLAGS": "results and times may depend on it",
    "JAX_PLATFORMS": "JAX looks for no other devices",
}
_NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
      verdict: "info"; "ok" for a check that passed; "note" for a possible cause of trouble; "wrong"
        for a check that failed.
      text: the result in words.
    """

    verdict: Literal["info", "ok", "note", "wrong"]
    text: str


def diagnose(config: DoctorConfig) -> list[Finding]:
    """Checks versions, devices, switches and folders, and a small clipped gradient.

    Args:
      config: names the folder for downloads to check.

    Returns:
      The findings; all is well if none is "wrong".

    Examples:
      >>> {finding.verdict for finding in diagnose(DoctorConfig())} <= {"info", "ok", "note"}
      True
    """
    requirements = _requirements()
    looks: list[Callable[[], Iterable[Finding]]] = [
        _versions,
        lambda: check_extras(requirements, _installed_version),
        lambda: check_jax(jax.__version__, requirements),
        check_switches,
        _cache_folder(config.cache_dir),
        _devices,
    ]
    found = [*itertools.chain.from_iterable(look() for look in looks)]
    if any(finding.verdict == "wrong" for finding in found):  # no device to compute on
        return found
    return [*found, *check_numbers()]


def report(findings: list[Finding]) -> str:
    """Formats the findings as lines.

    Args:
      findings: what `diagnose` returned.

    Returns:
      A line for each finding, and a summary.

    Examples:
      >>> print(report([Finding("ok", "numbers: right")]))
      ok     numbers: right
      All is well.
    """
    lines = [f"{finding.verdict:5}  {finding.text}" for finding in findings]
    verdicts = [finding.verdict for finding in findings]
    if "wrong" in verdicts:
        summary = "Something is wrong: see above."
    elif "note" in verdicts:
        summary = "All is well, but see the notes."
    else:
        summary = "All is well."
    return "\n".join([*lines, summary])


def check_extras(requirements: list[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """Checks whether the packages of the optional extras are installed and new enough.

    Args:
      requirements: the requirements in the package's metadata, such as
          `"tyro>=1.0.0; extra == 'train'"`.
      installed: a function from a package's name to its version, or None if it is missing.

    Returns:
      A finding for each extra except "docs" and "dev", which are for developers.

    Examples:
      >>> check_extras(["rich>=14.0; extra == 'train'"], {"rich": "13.1"}.get)[0].text
      "extra train: rich 13.1 is older than 14.0; pip install 'psclip_optax[train]'"
    """
    extras: dict[str, list[tuple[str, str]]] = {}
    for requirement in requirements:
        parsed = re.fullmatch(
            r"([\w.-]+)(?:>=([\d.]+))?.*;.*extra == ['\"]([\w-]+)['\"].*", requirement
        )
        if parsed and parsed[3] not in ("docs", "dev"):
            extras.setdefault(parsed[3], []).append((parsed[1], parsed[2] or "0"))
    return [_check_extra(extra, needed, installed) for extra, needed in extras.items()]


def check_jax(version: str, requirements: list[str]) -> list[Finding]:
    """Checks whether the library is tested with this version of JAX.

    Args:
      version: the version of JAX.
      requirements: the requirements in the package's metadata, which name the oldest version.

    Returns:
      One finding.

    Examples:
      >>> check_jax("0.6.2", ["jax>=0.7.0"])[0].text
      'JAX 0.6.2 is older than 0.7.0, the oldest that works; pip install --upgrade jax'
    """
    oldest = next((r.partition(">=")[2] for r in requirements if r.startswith("jax>=")), "0")
    if _numbers(version) < _numbers(oldest):
        text = f"JAX {version} is older than {oldest}, the oldest that works"
        return [Finding("note", f"{text}; pip install --upgrade jax")]
    if _numbers(version) > _numbers(NEWEST_TESTED_JAX):
        text = f"JAX {version} is newer than {NEWEST_TESTED_JAX}, the newest that this was tested"
        return [Finding("note", f"{text} with; look for a newer psclip_optax if checks fail")]
    return [Finding("ok", f"JAX {version} is in the tested range, {oldest} to {NEWEST_TESTED_JAX}")]


def check_switches() -> list[Finding]:
    """Lists the switches and variables that change JAX's results or speed.

    Returns:
      A note for each that is set.

    Examples:
      >>> with jax.debug_nans(True):
      ...     print(any("jax_debug_nans" in finding.text for finding in check_switches()))
      True
    """
    on = [name for name in _SWITCHES if getattr(jax.config, name, False)]
    given = [name for name in _VARIABLES if os.environ.get(name)]
    return [
        *(Finding("note", f"{name} is on: {_SWITCHES[name]}") for name in on),
        *(Finding("note", f"{name}={os.environ[name]}: {_VARIABLES[name]}") for name in given),
    ]


def check_numbers() -> list[Finding]:
    """Compares a small clipped gradient with a stack of gradients, on the default device.

    Returns:
      Two findings: whether the numbers agree in both fast modes, and whether a convolution, a
      product and a look-up have fast routes.

    Examples:
      >>> [finding.verdict for finding in check_numbers()]
      ['ok', 'ok']
    """
    params, batch = _small_problem()
    results = [_clipped(mode).verify(params, *batch, num_samples=_NUM_SAMPLES) for mode in _MODES]
    plan = _clipped("one_pass").explain(params, *batch)
    told = ", ".join(f"{result.mode} {result.largest_error:.1e}" for result in results)
    wrong = [str(result) for result in results if not result.ok]
    routes = {row.parameter: row.route for row in plan.rows}
    slow = [name for name, route in _ROUTES.items() if routes[f"['{name}']"] != route]
    return [
        Finding(
            "wrong" if wrong else "ok",
            "\n".join(
                [
                    f"numbers: clipped gradients differ from vmap(grad)'s by a relative {told}",
                    *wrong,
                ]
            ),
        ),
        Finding(
            "wrong" if slow else "ok",
            "fast path: "
            + (f"not taken for {', '.join(slow)}:\n{plan}" if slow else "taken, without fallbacks"),
        ),
    ]


def _loss(params: Any, image: Any, token: Any, label: Any) -> jax.Array:
    features = jax.lax.conv_general_dilated(
        image[None], params["convolution"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    pooled = jnp.tanh(features).mean((0, 1, 2))
    hidden = jnp.concatenate([pooled, params["embedding"][token]])
    logits = hidden @ params["kernel"] + params["bias"]
    return -jax.nn.log_softmax(logits)[label]


def _small_problem() -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32)

    params = {
        "convolution": normal(3, 3, 3, 32),
        "embedding": normal(50, 16),
        "kernel": normal(48, 10),
        "bias": jnp.zeros(10, jnp.float32),
    }
    samples = jnp.arange(_NUM_SAMPLES, dtype=jnp.int32)
    return params, (normal(_NUM_SAMPLES, 4, 4, 3), samples, samples % 3)


def _clipped(mode: Mode) -> ClippedValueAndGrad[jax.Array]:
    return clipped_value_and_grad(_loss, 1.0, mode=mode)


def _versions() -> list[Finding]:
    python = f"Python {platform.python_version()}, {platform.platform()}"
    versions = ", ".join(f"{name} {_installed_version(name) or 'missing'}" for name in _CORE)
    return [
        Finding("info", f"psclip_optax {psclip_optax.__version__}"),
        Finding("info", python),
        Finding("info", versions),
    ]


def why_no_device() -> str | None:
    """Says why JAX has no device to compute on.

    Returns:
      One line; None if it has a device.

    Examples:
      >>> why_no_device()
    """
    try:
        jax.devices()
    except RuntimeError as error:
        return f"JAX finds no device: {' '.join(str(error).split())}"
    except AssertionError:  # JAX's only error for a platform whose plugin is not installed
        platforms = getattr(jax.config, "jax_platforms", None)
        return (
            f"JAX finds no device: expected one of {platforms}, which this "
            "installation of JAX has no plugin for; install it, or unset JAX_PLATFORMS"
        )
    return None


def _devices() -> list[Finding]:
    reason = why_no_device()
    if reason is not None:
        return [Finding("wrong", reason)]
    devices = jax.devices()
    findings = [
        Finding("info", f"device {_name(device)}: {device.device_kind}, {_memory(device)}")
        for device in devices
        if device.process_index == jax.process_index()
    ]
    if devices[0].platform == "cpu" and _NVIDIA_DRIVER.exists():
        text = "there is an NVIDIA GPU, but JAX computes on the CPU; install JAX for CUDA, see "
        findings.append(Finding("note", f"{text}https://docs.jax.dev/en/latest/installation.html"))
    return findings


def _name(device: Any) -> str:
    return f"{device.platform}:{device.id}"  # str(device) differs between versions of JAX


def _memory(device: Any) -> str:
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return "memory not told"
    limit, used = statistics["bytes_limit"], statistics.get("bytes_in_use", 0)
    return f"{used / 2**30:.1f} of {limit / 2**30:.1f} GiB in use"


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("psclip_optax") or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder, not installed
        return []


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_extra(
    extra: str, needed: list[tuple[str, str]], installed: Callable[[str], str | None]
) -> Finding:
    versions = {name: installed(name) for name, _ in needed}
    trouble = [
        f"{name} is missing" if version is None else f"{name} {version} is older than {oldest}"
        for name, oldest in needed
        if (version := versions[name]) is None or _numbers(version) < _numbers(oldest)
    ]
    if trouble:
        told = ", ".join(trouble)
        return Finding("note", f"extra {extra}: {told}; pip install 'psclip_optax[{extra}]'")
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("ok", f"extra {extra}: {told}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _cache_folder(given: pathlib.Path | None) -> Callable[[], list[Finding]]:
    def look() -> list[Finding]:
        folder = given or _default_cache_folder()
        return [] if folder is None else [check_cache_folder(folder.expanduser().absolute())]

    return look


def check_cache_folder(folder: pathlib.Path) -> Finding:
    """Checks whether data sets could be downloaded to a folder, without creating it.

    Args:
      folder: an absolute path; may be missing.

    Returns:
      "ok", or a note that says why not.

    Examples:
      >>> check_cache_folder(pathlib.Path(tempfile.gettempdir()) / "not" / "there").verdict
      'ok'
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding("ok", f"folder for downloads: {folder}")
    except OSError as error:
        text = f"folder for downloads: cannot write to {existing}: {error.strerror}"
        return Finding("note", f"{text}; choose another with --cache-dir, or use --data-dir")


def _default_cache_folder() -> pathlib.Path | None:
    try:
        import pooch
    except ModuleNotFoundError:  # the extra that downloads is missing
        return None
    return pathlib.Path(pooch.os_cache("psclip_optax"))
