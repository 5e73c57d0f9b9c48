"""The system calls of the output side, each by a name that a test can replace.

Everything that may fail on a full, broken or odd file system goes through here, so that a test
makes the n-th call fail without knowing who calls.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moeconv import errors

DIRECT_FLAG: int = getattr(os, "O_DIRECT", 0)  # 0: this platform has none
# What a file system answers when it does not offer a call at all.
UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CONTINUES = "the same command continues where this one stopped"

# linux/fs.h
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4


def _libc(name: str, *argtypes: type) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = argtypes
    return function


_FALLOCATE = _libc("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_SYNC_FILE_RANGE = _libc(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_STATX = _libc("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_SYSCALL = _libc(
    "syscall" if sys.platform == "linux" else "",
    *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint),
)
_MALLOPT = _libc("mallopt", ctypes.c_int, ctypes.c_int)
_MMAP_THRESHOLD, _RETURNED_NBYTES = -3, 1 << 20  # malloc.h of glibc

# linux/stat.h: the mask comes first in struct statx, dio_mem_align and dio_offset_align at 152.
_STATX_NBYTES, _STATX_DIOALIGN, _DIOALIGN_AT = 256, 0x2000, 152
_AT_EMPTY_PATH = 0x1000
_CACHESTAT, _CACHESTAT_NBYTES = 451, 40  # Linux 6.5; the same number on every architecture


def _call(function: Callable[..., int] | None, *arguments: object) -> None:
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def fallocate(fd: int, nbytes: int) -> None:
    """Reserve the first `nbytes` of a file, or raise OSError.

    Not os.posix_fallocate: where the file system cannot, glibc writes a byte into every block.
    """
    _call(_FALLOCATE, fd, 0, 0, nbytes)


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to start writing these dirty pages; return at once."""
    _call(_SYNC_FILE_RANGE, fd, offset, nbytes, _SYNC_WRITE)


def await_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Return when these pages are written."""
    flags = _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
    _call(_SYNC_FILE_RANGE, fd, offset, nbytes, flags)


def drop_pages(fd: int, offset: int, nbytes: int) -> None:
    """Let the clean whole pages of a range leave the page cache; 0 bytes mean to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def direct_units(fd: int) -> tuple[int, int] | None:
    """Return what addresses and offsets past the page cache must be multiples of; None: not told.

    Zeros mean that nothing of this file can go past it.
    """
    found = ctypes.create_string_buffer(_STATX_NBYTES)
    try:
        _call(_STATX, fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found)
    except OSError:
        return None
    if not struct.unpack_from("=I", found)[0] & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", found, _DIOALIGN_AT)
    return int(memory), int(offset)


def cached_nbytes(fd: int, offset: int, nbytes: int) -> int:
    """Return how many bytes of a range the page cache holds, in whole pages, or raise OSError."""
    found = ctypes.create_string_buffer(_CACHESTAT_NBYTES)
    _call(_SYSCALL, _CACHESTAT, fd, struct.pack("=QQ", offset, nbytes), found, 0)
    return int(struct.unpack_from("=Q", found)[0]) * mmap.PAGESIZE


def return_freed_memory() -> None:
    """Let malloc give back what is freed of 1 MiB and more at once, in all of this process.

    glibc else keeps up to 64 MiB a thread once a large block was freed; other libraries do not.
    """
    if _MALLOPT is not None:
        _MALLOPT(_MMAP_THRESHOLD, _RETURNED_NBYTES)


def read_cached(fd: int, buffers: Sequence[bytearray], offset: int) -> int:
    """Read what the page cache holds; BlockingIOError for nothing, another OSError: not known."""
    if not hasattr(os, "RWF_NOWAIT"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)


open_file = os.open
pwrite = os.pwrite
truncate = os.ftruncate
sync_file = os.fsync
sync_data = getattr(os, "fdatasync", os.fsync)
rename = os.replace


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of a view of bytes at `offset`, however many calls that takes."""
    done = 0
    while done < view.nbytes:
        try:
            written = pwrite(fd, view[done:], offset + done)
        except InterruptedError:
            continue
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        done += written


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; some file systems cannot and say so."""
    fd = open_file(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        sync_file(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def make_directories(directory: Path) -> None:
    """Create a directory and its parents as far as they are missing, their names durable."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def failed(action: str, error: OSError, where: str, hint: str = "") -> errors.IOFailed:
    """Return the error of a call that failed, with the hint that suits its reason."""
    reason = error.strerror or str(error)
    if error.errno in FULL and not hint:
        hint = f"free some space; {CONTINUES}"
    elif error.errno == errno.EMFILE and not hint:
        hint = f"raise the limit on open files (ulimit -n); {CONTINUES}"
    elif not hint:
        hint = f"check the disk and its mount; {CONTINUES}"
    return errors.IOFailed(f"cannot {action}: {reason}", where=where, hint=hint)
