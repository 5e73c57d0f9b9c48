"""Everything that is measured of a machine, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.codecs.amx import FORMS
from moeconv.kernels.cpu.roofline import ROOFS
from moeconv.measure import disk, kernels
from moeconv.measure.cases import cases
from moeconv.measure.disk import Effort as DiskEffort
from moeconv.measure.figures import WORKS, Disk, Figures, Rates, rate_key, roof_key
from moeconv.measure.kernels import Effort as KernelEffort
from moeconv.measure.start import start_seconds

Say = Callable[[str, str], None]  # told what is measured next: the part, and what of it


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to run of each; `starts`: conversions of next to nothing."""

    kernels: KernelEffort = field(default_factory=KernelEffort)
    disk: DiskEffort = field(default_factory=DiskEffort)
    starts: int = 4


def measure(directory: Path, source: Sequence[Path], effort: Effort, say: Say) -> Figures:
    """Return what this machine does, its outputs going to the disk of `directory`.

    `source`: the files of a source, whose disk is read from; without any what was written is.
    Refused where `directory` cannot be written to.
    """
    disks: dict[str, Disk] = {}
    with disk.workplace(directory, effort.disk) as place:
        say("the disk", "")
        writes, direct = disk.measure_writes(place, effort.disk)
        read = list(source) or [disk.made_file(place, effort.disk)]
        reads, _ = disk.measure_reads(read, effort.disk)
        disks[disk.disk_id(directory)] = Disk(writes, None, effort.disk.threads, direct)
        where = disk.disk_id(read[0])
        disks[where] = disks.get(where, Disk(threads=effort.disk.threads))._replace(read=reads)
        say("start-up", "")
        seconds = start_seconds(place, effort.starts)
    rates = measure_rates(effort.kernels, say)
    return Figures(effort.kernels.threads, seconds, rates, disks)


def measure_rates(effort: KernelEffort, say: Say) -> dict[str, Rates]:
    """Return the rates of memory, of what every conversion does and of every kernel, by key."""
    found: dict[str, Rates] = {}
    with kernels.bench(effort) as bench:
        say("memory", "")
        found |= {roof_key(bits): bench.memory(bits) for bits in ROOFS}
        found |= {name: bench.work(name) for name in WORKS}
        for case in cases(effort.tile):
            say("kernels", case.title)
            found[rate_key(case.kernel, case.params)] = bench.decode(case)
        for name in FORMS:
            say("kernels", name)
            found[name] = bench.encode(name)
    return found
