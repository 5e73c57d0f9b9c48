"""Windows of integers: the arrays and the job that ints.decode takes, whatever way they lie."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeconv.codecs import bits as b
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import int_runs, ints
from moeconv.kernels.cpu.base import ELEMENTS, Array, Counts, check_array, rows_of
from moeconv.kernels.cpu.copies import copy_into
from moeconv.kernels.cpu.floats import BF16, CODES
from moeconv.kernels.cpu.scaled import limits

I4 = np.dtype(np.int32)
IN_ORDER: npt.NDArray[np.int32] = np.empty(0, I4)
NO_PLACES: npt.NDArray[np.int32] = np.empty((0, 2), I4)
NO_WORDS: npt.NDArray[np.uint32] = np.empty(0, np.uint32)
TURNED_ROWS = 512  # rows at a time: AWQ has one word for 8 of them, and copies tiles of 64


class Stored(NamedTuple):
    """The arrays of a window.

    codes: bytes [R, C], words [R, W] or, across rows, [W, C]; scales: float32 [R or 1, G]; zeros:
    int32 [R or 1, G], packed words [W, G], or as scales where there are none; order: the group of
    each column, int32 [C], empty where columns are in order; places: word and shift of each row's
    field, int32 [R, 2], where anything lies across rows.
    """

    codes: Array
    scales: Array
    zeros: Array
    order: npt.NDArray[np.int32] = IN_ORDER
    places: npt.NDArray[np.int32] = NO_PLACES


@lru_cache(maxsize=16)
def places_of(rows: int, bits: int, run: b.Run) -> npt.NDArray[np.int32]:
    """Return [R, 2]: the word and the shift of each row's field in words along the rows."""
    row = np.arange(rows)
    bit = row % run.elements * bits
    found = np.stack((row // run.elements * run.words + bit // 32, bit % 32), axis=1).astype(I4)
    found.flags.writeable = False
    return found


def plain_zeros(stored: Array) -> Array:
    """Return int32 [R, G] of int8 (which are read as bytes) or int32 zero points."""
    return stored if stored.itemsize == 4 else stored.view(np.int8).astype(I4)


def in_groups(job: ints.Job, window: Window, group_size: int) -> ints.Job:
    """Return the job with the groups of a window whose columns are in order."""
    if group_size == b.ONE_GROUP:
        return job._replace(group_cols=max(window.cols, 1), first=0, groups=1)
    first = window.col_start % group_size
    groups = -(-(first + window.cols) // group_size)
    return job._replace(group_cols=group_size, first=first, groups=groups)


def in_activation_order(job: ints.Job, g_idx: Array, groups: int) -> tuple[ints.Job, Array]:
    """Return the job with `groups` groups, and the group of each column, int32 [C]."""
    return job._replace(groups=groups), g_idx.reshape(-1).astype(I4)


def decode_rows(stored: Stored, job: ints.Job, out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C]; the codes' shape has been checked."""
    rows, cols = out.shape
    if stored.order.size:
        check_array("g_idx", stored.order[None], I4, (1, cols))
    check_array("out", out, ELEMENTS[out_dtype], (rows, cols))
    scale_rows = 1 if len(stored.scales) == 1 else rows
    check_array("scales", stored.scales, ELEMENTS["F32"], (scale_rows, job.groups))
    if job.zeros == ints.PLAIN_ZEROS:
        check_array("zeros", stored.zeros, I4, (scale_rows, job.groups))
    if job.zeros == ints.PACKED_ZEROS:
        least = max(len(stored.zeros), _words_across(stored.places, job.bits))
        check_array("zeros", stored.zeros, I4, (least, job.groups))
    by_words = job.layout in (ints.FIELDS, ints.ACROSS)
    given = _given(stored, _of_output(job, out_dtype, out), out, by_words)
    if _is_tame_work(stored, given[-1]) and int_runs.decode(*given):
        return Counts(0, 0, 0)
    return Counts(*ints.decode(*given))


def _of_output(job: ints.Job, out_dtype: str, out: Array) -> ints.Job:
    """Return the job with what it makes."""
    low, high = limits(1.0, ints.LARGEST, out_dtype)
    rows, cols = out.shape
    return job._replace(
        rows=rows, cols=cols, code=CODES[out_dtype], width=out.itemsize, low=low, high=high
    )


def _is_tame_work(stored: Stored, job: ints.Job) -> bool:
    """Return whether int_runs takes this job, if all scales are tame."""
    return job.code == BF16 and not stored.order.size and int_runs.fits(job)


def _given(
    stored: Stored, job: ints.Job, out: Array, by_words: bool
) -> tuple[ints.Memory, ints.Columns, Array, ints.Pitches, ints.Job]:
    """Return the arguments of a kernel; by_words: whether it reads words of codes."""
    codes, scales, given = rows_of(stored.codes), rows_of(stored.scales), rows_of(out)
    zeros = scales if stored.zeros is stored.scales else rows_of(stored.zeros)
    once = len(stored.scales) == 1  # and every row takes it
    pitches = (
        codes.pitch // 4 if by_words else codes.pitch,
        0 if once else scales.pitch // 4,
        0 if once and job.zeros == ints.PLAIN_ZEROS else zeros.pitch // 4,
        given.pitch // out.itemsize,
    )
    memory = (
        codes.memory,
        codes.memory.view(np.uint32) if by_words else NO_WORDS,
        scales.memory.view(np.float32),
        zeros.memory.view(np.uint32),
    )
    return memory, (stored.order, stored.places.reshape(-1)), given.memory, pitches, job


def decode_turned(stored: Stored, job: ints.Job, out_dtype: str, out: Array) -> Counts:
    """Fill `out` [R, C] from codes, scales and zeros that are stored with rows along the minor
    axis; what they are turned into is as small as a tile of rows.
    """
    rows = len(out)
    check_array("scales", stored.scales, ELEMENTS["F32"], (job.groups, rows))
    if not out.size:  # places of no rows do not say how many words of zeros there are
        return Counts(0, 0, 0)
    full = _of_output(job, out_dtype, out)
    if _is_tame_work(stored, full):
        check_array("out", out, ELEMENTS[out_dtype], out.shape)
        if job.zeros == ints.PACKED_ZEROS:
            least = max(stored.zeros.shape[1], _words_across(stored.places, job.bits))
            check_array("zeros", stored.zeros, I4, (job.groups, least))
        if int_runs.decode_turned(*_given(stored, full, out, True)):
            return Counts(0, 0, 0)
    zeros = stored.zeros if job.zeros == ints.NO_ZEROS else _turned(stored.zeros)
    nan = inf = overflow = 0
    for start in range(0, rows, TURNED_ROWS):
        stop = min(start + TURNED_ROWS, rows)
        places, base = stored.places[start:stop], 0
        if len(places):
            base = int(places[0, 0])
            places = places - np.array([base, 0], I4)
        across = job.layout == ints.ACROSS
        codes = (
            slice(base, base + _words_across(places, job.bits)) if across else slice(start, stop)
        )
        scales = _turned(stored.scales[:, start:stop])
        tile = Stored(
            _turned(stored.codes[:, codes]),
            scales,
            scales if job.zeros == ints.NO_ZEROS else zeros[base:],
            stored.order,
            places,
        )
        found = decode_rows(tile, job, out_dtype, out[start:stop])
        nan, inf, overflow = nan + found.nan, inf + found.inf, overflow + found.overflow
    return Counts(nan, inf, overflow)


def _words_across(places: npt.NDArray[np.int32], bits: int) -> int:
    """Return how many words along the rows hold the fields at these places."""
    return int((places[:, 0] + (places[:, 1] + bits > b.WORD_BITS)).max(initial=-1)) + 1


def _turned(stored: Array) -> Array:
    """Return the transpose, row-contiguous."""
    given = np.empty(stored.shape[::-1], stored.dtype)
    copy_into(given, stored.T)
    return given
