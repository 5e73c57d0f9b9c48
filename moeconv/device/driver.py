"""The NVIDIA driver, asked without torch: which GPUs are there, and how large they are.

`plan` asks here, so that it never imports torch; CUDA_VISIBLE_DEVICES is respected as CUDA does.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"  # comes with the driver, not with the toolkit
_NAME_NBYTES = 256


class Card(NamedTuple):
    """A GPU as the driver knows it."""

    number: int
    name: str
    nbytes: int


def cards(library: str = LIBRARY) -> tuple[Card, ...]:
    """Return the GPUs that this process may use; none without a driver, or with one that fails."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = (_card(driver, index) for index in range(count.value))
    return tuple(card for card in found if card is not None)


def _card(driver: Any, index: int) -> Card | None:
    handle, nbytes = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_NBYTES)
    failed = (
        driver.cuDeviceGet(ctypes.byref(handle), index)
        or driver.cuDeviceGetName(name, _NAME_NBYTES, handle)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(nbytes), handle)
    )
    if failed:
        return None
    return Card(index, name.value.decode(errors="replace"), nbytes.value)
