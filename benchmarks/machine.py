"""What a measurement must say about where it was made: versions and the class of machine, nothing
that names it."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

PACKAGES = ("innerloop", "torch", "higher", "torchopt", "jax", "jaxopt", "optimistix")


def describe() -> dict[str, str]:
    """Date, processor, versions."""
    facts = {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores ({platform.machine()}), 1 thread used",
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        found = importlib.util.find_spec(package) is not None
        facts[package] = importlib.metadata.version(package) if found else "not installed"
    return facts


def load() -> float:
    """How many processes wanted a processor over the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
