"""Regular runs of a file: which gaps between them are cheaper read than jumped over."""

from __future__ import annotations

CHUNK_NBYTES = 4 << 20
SMALL_SPAN_NBYTES = 1 << 20
MAX_WASTE = 4  # read the gaps too while they are at most this many times what is wanted
GAP_NBYTES = 4 << 10  # gaps up to a page cost the disk nothing, and a call more than their bytes


def runs_per_read(stride: int, run: int, count: int) -> int:
    """Return how many of `count` runs of `run` bytes one request reads, the gaps between them too.

    1 where the gaps are long, and much more than what is wanted.
    """
    short = stride - run <= GAP_NBYTES or stride <= MAX_WASTE * run
    return max(1, CHUNK_NBYTES // stride) if short or stride * count <= SMALL_SPAN_NBYTES else 1
