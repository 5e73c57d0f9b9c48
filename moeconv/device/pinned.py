"""Host memory that a GPU copies from and to by itself: page-locked, and given back unlocked."""

from __future__ import annotations

import contextlib
import weakref

import torch

from moeconv.store.buffers import Bytes, address, pages

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU, not for the current one alone


def pinned_pages(nbytes: int, device: torch.device) -> Bytes:
    """Return fresh whole pages [nbytes or more] uint8, locked if the system allows it.

    Unlocked ones work as well, only slower: the driver copies by way of its own buffers. `device`
    is one that is in use: locking on another would take memory of that one, too.
    """
    memory = pages(nbytes)
    start = address(memory)
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(start, memory.size, _PORTABLE)) == 0:
            # Before the pages go: the finalizer runs while the mapping is still there.
            weakref.finalize(memory, _unlock, start, device)
        else:
            _forget_error(device)
    return memory


def _unlock(start: int, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):  # a device may have failed
        torch.cuda.cudart().cudaHostUnregister(start)


def _forget_error(device: torch.device) -> None:
    """Launch something: CUDA reports a thread's last error at its next launch, whatever it was."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
