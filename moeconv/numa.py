"""Memory on a chosen NUMA node: anonymous pages bound with mbind, through the C library alone.

The kernel ignores mbind for shared mappings of files; anonymous memory obeys it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moeconv.errors import Refused

NODES = Path("/sys/devices/system/node")

# linux/mempolicy.h
MPOL_BIND = 2
MPOL_F_NODE, MPOL_F_ADDR = 1, 2


class _Calls(NamedTuple):
    """Numbers of the system calls, which libc has no functions for."""

    mbind: int
    get_mempolicy: int


# arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h
_CALLS: Mapping[str, _Calls] = {"x86_64": _Calls(237, 239), "aarch64": _Calls(235, 236)}
_MASK_BITS = 1024  # nodes that a mask names; the kernel's most
_Mask = ctypes.c_ulong * (_MASK_BITS // (8 * ctypes.sizeof(ctypes.c_ulong)))


class Bound(NamedTuple):
    """Anonymous memory and the node that holds its pages; None: wherever the kernel puts them."""

    memory: mmap.mmap
    node: int | None


def memory_nodes() -> tuple[int, ...]:
    """Return the NUMA nodes that have memory; (0,) where the system names none."""
    for name in ("has_memory", "online"):
        with contextlib.suppress(OSError, ValueError):
            found = parse_list((NODES / name).read_text(encoding="ascii"))
            if found:
                return found
    return (0,)


def parse_list(text: str) -> tuple[int, ...]:
    """Return the numbers of a list as the kernel writes it: "0-2,5" is 0, 1, 2, 5."""
    numbers: list[int] = []
    for item in text.strip().split(","):
        first, _, last = item.partition("-")
        if item:
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def node_for(part: int) -> int:
    """Return the node for a NUMA part: nodes in turn, where there are fewer of them than parts."""
    nodes = memory_nodes()
    return nodes[part % len(nodes)]


def bound_memory(nbytes: int, node: int) -> Bound:
    """Return anonymous memory of `nbytes` whose pages come from `node` when they are touched.

    On a machine of one node nothing needs binding. Refused where the kernel does not allow it.
    """
    region = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    if memory_nodes() == (node,):
        return Bound(region, node)
    code = _mbind(region, node)
    if code == 0:
        return Bound(region, node)
    region.close()
    raise Refused(
        f"memory cannot be bound to NUMA node {node}: {os.strerror(code)}",
        hint="in a container, mbind needs the capability SYS_NICE; or load with bind=False",
    )


def node_of(memory: mmap.mmap, offset: int = 0) -> int | None:
    """Return the node of the page at `offset`, which must have been touched; None if unknown."""
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return None
    found = ctypes.c_int(-1)
    arguments = (
        ctypes.byref(found),
        None,
        ctypes.c_ulong(0),
        ctypes.c_void_p(_address(memory) + offset),
        ctypes.c_ulong(MPOL_F_NODE | MPOL_F_ADDR),
    )
    return found.value if _syscall(calls.get_mempolicy, *arguments) == 0 else None


def _mbind(memory: mmap.mmap, node: int) -> int:
    """Return 0, or the errno with which the kernel refuses."""
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return errno.ENOSYS
    mask = _Mask()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << node % bits
    return _syscall(
        calls.mbind,
        ctypes.c_void_p(_address(memory)),
        ctypes.c_ulong(len(memory)),
        ctypes.c_int(MPOL_BIND),
        ctypes.byref(mask),
        ctypes.c_ulong(_MASK_BITS),
        ctypes.c_uint(0),
    )


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _syscall(number: int, *arguments: object) -> int:
    """Return 0 or the errno of a system call."""
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    result = function(ctypes.c_long(number), *arguments)
    return 0 if result >= 0 else ctypes.get_errno()
