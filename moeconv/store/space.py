"""How much disk, memory and processor this process may use."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from moeconv.errors import Refused

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

LEAST_NBYTES = 64 << 20  # that work is given where next to nothing is free
_UNITS = ("KB", "MB", "GB", "TB", "PB")


def human(nbytes: int) -> str:
    """Return a number of bytes in decimal units, as disks are sold: 1.5 GB, 999 B."""
    if nbytes < 1000:
        return f"{nbytes} B"
    amount = float(nbytes)
    unit = "B"
    for larger in _UNITS:
        if amount < 999.95:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}"


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write at `path`, which need not exist yet."""
    disk = os.statvfs(_existing(path))
    return disk.f_bavail * disk.f_frsize


def _existing(path: Path) -> Path:
    """Return what is there of a path: itself, or the nearest above it."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return existing


def check_writable(path: Path) -> None:
    """Raise Refused unless this user may write in the directory `path`, or create it."""
    existing = _existing(path)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise Refused(
            "the output directory cannot be written to: "
            + ("no permission, or mounted read-only" if existing.is_dir() else "not a directory"),
            where=str(existing),
            hint="check its permissions and mount, or choose another directory",
        )


def check_space(path: Path, needed_nbytes: int, already_nbytes: int = 0) -> None:
    """Raise Refused unless `needed_nbytes` fit, of which `already_nbytes` are reserved there."""
    free = free_bytes(path)
    missing = needed_nbytes - already_nbytes - free
    if missing <= 0:
        return
    reserved = f", {human(already_nbytes)} of it reserved already" if already_nbytes else ""
    raise Refused(
        f"not enough disk space: {human(needed_nbytes)} needed{reserved}, {human(free)} free",
        where=str(path),
        hint=f"free {human(missing)} ({missing:,} bytes) or choose another directory",
    )


def memory_limit() -> int:
    """Return the bytes that this process may take now: free memory, and less in a full cgroup."""
    return max(min([_available(), *_cgroup_memory()]), 0)


def choose_memory(given: int | None, most: int) -> int:
    """Return the bytes that work may take: `given`, else `most`, or half of what is free.

    Raises Refused for more than is free.
    """
    free = memory_limit()
    if given is None:
        return min(most, max(free // 2, LEAST_NBYTES))
    if given > free:
        raise Refused(
            f"--memory {human(given)} is more than is free here ({human(free)})",
            hint="a smaller --memory; without it at most half of what is free",
        )
    return given


def process_peak_rss() -> int:
    """Return the largest resident memory of this process so far.

    Not ru_maxrss where /proc has better: that begins with what the parent had at the fork.
    """
    peak = _field(PROC / "self/status", "VmHWM:")
    if peak is not None:
        return peak * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_count() -> int:
    """Return how many threads can run at once: the affinity, and the cgroup's quota rounded up."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = [-(-quota // period) for quota, period in _cgroup_quotas() if min(quota, period) > 0]
    return max(min([cores, *quotas]), 1)


def _available() -> int:
    available = _field(PROC / "meminfo", "MemAvailable:")
    if available is not None:
        return available * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_memory() -> Iterator[int]:
    """Yield what each cgroup above this process leaves; its idle file pages count as free."""
    tables = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for controller, limit_name, usage_name, idle_name in tables:
        for group in _groups(controller):
            limit, usage = _number(group / limit_name), _number(group / usage_name)
            if limit is not None and usage is not None:
                yield limit - usage + (_field(group / "memory.stat", idle_name) or 0)


def _cgroup_quotas() -> Iterator[tuple[int, int]]:
    """Yield (quota, period) in microseconds of each cgroup above this process that has one."""
    for group in _groups(""):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and all(word.isdecimal() for word in words):
            yield int(words[0]), int(words[1])
    for group in _groups("cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and period is not None:
            yield quota, period


def _groups(controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroup and of those above it; "" means version 2.

    Inside a container the path that /proc shows may be the host's: then only the top exists.
    """
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controller in controllers.split(","):
            for root in _mounts(controllers):
                group = root / path.lstrip("/")
                yield from (g for g in (group, *group.parents) if g.is_relative_to(root))


def _mounts(controllers: str) -> tuple[Path, ...]:
    if not controllers:
        return CGROUP, CGROUP / "unified"
    return tuple(CGROUP / name for name in dict.fromkeys([controllers, *controllers.split(",")]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _field(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None
