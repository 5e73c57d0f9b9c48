"""What a compiled loop became: its assembly, cut where it jumps."""

from __future__ import annotations

import re
from typing import Any

import numba

nb: Any = numba.types


def assembly_of(loop: Any, *arguments: Any) -> str:
    """Return the assembly of a jitable function, compiled for these types."""
    fresh: Any = numba.njit(arguments, nogil=True)(loop.py_func)
    (found,) = fresh.inspect_asm().values()
    return str(found)


def assert_one_run(assembly: str, wanted: tuple[str, ...]) -> None:
    """Assert that a run without a jump or call has all of the instructions wanted."""
    straight = re.split(r"^\s+(?:j\w+|call\w*)\s.*$|^\S+:.*$", assembly, flags=re.MULTILINE)
    assert any(all(re.search(one, run) for one in wanted) for run in straight)
