"""What a run may use of the machine: threads, and bytes in flight."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.errors import Refused
from moeconv.execute import Limits
from moeconv.store.space import choose_memory, cpu_count, human

DEFAULT_MEMORY_NBYTES = 2 << 30
WAITING_JOBS = 2  # beside one per core: a task that waits for the disk needs no core
IDLE_SHARE = 4  # a quarter of the memory may lie idle in the pool, waiting for the next task


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output.

    memory_nbytes: of tasks in flight; None: 2 GiB, or half of what is free where that is less.
    """

    memory_nbytes: int | None = None
    jobs: int | None = None
    overwrite: bool = False
    device: str = "auto"  # or cpu, cuda, cuda:I
    vram_nbytes: int | None = None  # of each GPU; None: 4 GiB, or half of what is free


def choose_limits(resources: Resources) -> Limits:
    """Return threads and memory, from the machine where they are not given.

    Raises Refused for more memory than is free.
    """
    jobs = resources.jobs or cpu_count() + WAITING_JOBS
    memory = choose_memory(resources.memory_nbytes, DEFAULT_MEMORY_NBYTES)
    return Limits(jobs, memory * (IDLE_SHARE - 1) // IDLE_SHARE)


def memory_for(flight_nbytes: int) -> int:
    """Return the --memory of which tasks in flight may take `flight_nbytes`."""
    return -(-flight_nbytes * IDLE_SHARE // (IDLE_SHARE - 1))


def check_vram(max_nbytes: int, floor_nbytes: int) -> None:
    """Raise Refused if the largest block does not fit in what a decoder may take."""
    if floor_nbytes > max_nbytes:
        raise Refused(
            f"--vram is too small: windows may take {human(max_nbytes)} of it, and the largest "
            f"block needs {human(floor_nbytes)}",
            hint=f"--vram {-(-floor_nbytes // (1 << 20)) * 2}MiB or more, or --device cpu",
        )


def check_floor(limits: Limits, floor_nbytes: int, given_nbytes: int | None = None) -> None:
    """Raise Refused if the largest block does not fit in what tasks in flight may take.

    `given_nbytes`: the --memory that the limits come of, None where none was given.
    """
    if floor_nbytes > limits.memory_nbytes:
        needed = memory_for(floor_nbytes)
        given = human(given_nbytes or memory_for(limits.memory_nbytes))
        raise Refused(
            f"--memory {given} is too small: the largest block needs {human(needed)}",
            hint=f"--memory {-(-needed // (1 << 20))}MiB or more",
        )
