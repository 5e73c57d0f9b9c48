"""Triton's interpreter, made to put its own functions in the place of the language's once."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any


def patch_once() -> None:
    """Let the language stay as the interpreter patches it; do nothing where Triton is not there.

    It patches for every launch, and again for every function that a kernel calls, which takes half
    of its time.
    """
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    stays: Any = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda _: stays
