"""This machine in words."""

from __future__ import annotations

import os
import platform

from moeconv.store.space import PROC, cpu_count


def describe_machine() -> str:
    """Return processor, cores, memory, Linux and Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"{_processor()}, {cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {kernel}, "
        f"Python {platform.python_version()}"
    )


def _processor() -> str:
    """Return the model's name where the kernel tells it, else the architecture."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
