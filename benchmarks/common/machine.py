"""Describes the machine of a measurement."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
from typing import Any

import jax

import psclip_optax as psc


def cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "psclip_optax": psc.__version__,
        "date": datetime.date.today().isoformat(),
    }


def describe(machine: dict[str, Any]) -> str:
    on_cpu = machine["platform"] == "cpu"
    device = f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else machine["device"]
    return f"{device}; JAX {machine['jax']}; {machine['date']}"
