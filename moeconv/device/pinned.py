"""Host memory that a GPU copies from and to by itself: page-locked, and given back unlocked."""

from __future__ import annotations

import weakref

import torch

from moeconv.store.buffers import Bytes, address, pages

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU, not for the current one alone


def pinned_pages(nbytes: int) -> Bytes:
    """Return fresh whole pages [nbytes or more] uint8, locked if the system allows it.

    Unlocked ones work as well, only slower: the driver copies by way of its own buffers.
    """
    memory = pages(nbytes)
    runtime = torch.cuda.cudart()
    start = address(memory)
    if int(runtime.cudaHostRegister(start, memory.size, _PORTABLE)) == 0:
        # Before the pages go: the finalizer runs while the mapping is still there.
        weakref.finalize(memory, runtime.cudaHostUnregister, start)
    return memory
