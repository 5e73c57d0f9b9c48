"""The clock of the kernels: which threads run what, and where."""

from __future__ import annotations

import os

import pytest

from moeconv.measure import kernels
from moeconv.measure.cases import Tile


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept on cores")
def test_threads_keep_to_cores_of_their_own() -> None:
    """Two that share a core are no faster than one, whatever the kernel."""
    effort = kernels.Effort(Tile(32, 64), tiles=2, passes=1, repeats=1)
    seen: dict[int, set[int]] = {}
    whole = os.sched_getaffinity(0)
    with kernels.bench(effort) as bench:
        bench.rate(lambda index: seen.update({index: os.sched_getaffinity(0)}), threads=2)
    assert set(seen) == {0, 1}
    assert all(len(cores) == 1 and cores <= whole for cores in seen.values())
    assert len(seen[0] | seen[1]) == min(2, len(whole))
    assert os.sched_getaffinity(0) == whole
