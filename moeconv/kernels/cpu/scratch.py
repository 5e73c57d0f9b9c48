"""What kernels take beside their parts and output: at most so many bytes, a rule per codec.

tests/test_strips.py holds the rules to what numpy allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moeconv.codecs.base import Window
from moeconv.codecs.ggml import Ggml
from moeconv.kernels.cpu import ggml
from moeconv.kernels.cpu.int_windows import TURNED_ROWS
from moeconv.types import Params

INDICES_NBYTES = 64  # of these per row or column: where its field lies, and its group
FLOAT_NBYTES = 4  # of a scale; as many as of a zero point, once it is as wide as kernels take it

# bytes of each part as kernels take it (scales in float32), window, params, output dtype
Rule = Callable[[Mapping[str, int], Window, Params, str], int]


def _indices(window: Window) -> int:
    return INDICES_NBYTES * (window.rows + window.cols)


def of_plain(taken: Mapping[str, int], window: Window, params: Params, dtype: str) -> int:
    """Return what is made of zero points of 8 bits, which are as many as the scales, and order."""
    scales = taken["weight_scale"]
    narrow = params["zeros"] in (True, "plain") and taken["weight_zero_point"] < scales
    return _indices(window) + (scales if narrow else 0)


def of_turned(taken: Mapping[str, int], window: Window, params: Params, dtype: str) -> int:
    """Return what is turned: all of the zero points, some rows at a time of the rest.

    Of these the last ones are still there while the next are made.
    """
    rows = min(2 * TURNED_ROWS, window.rows)
    some = -(-sum(taken.values()) * rows // max(window.rows, 1))
    return some + taken.get("qzeros", 0) + _indices(window)


def of_nf4(taken: Mapping[str, int], window: Window, params: Params, dtype: str) -> int:
    """Return the scales of the blocks that are touched, out of tables or not."""
    blocks = -(-window.rows * int(params["cols"]) // int(params["blocksize"]))
    return blocks * FLOAT_NBYTES


def of_ggml(taken: Mapping[str, int], window: Window, params: Params, dtype: str) -> int:
    """Return the tile of float32, or what gguf-py holds to make it of a type without a kernel."""
    known = params["type"] in ggml.BLOCK_TYPES
    if known and dtype != "F16":
        return 0
    each = FLOAT_NBYTES if known else Ggml().reference_nbytes
    return each * min(window.rows, -(-ggml.TILE // max(window.cols, 1))) * window.cols


RULES: Mapping[str, Rule] = {
    "awq": of_turned,
    "ggml": of_ggml,
    "gptq": of_turned,
    "int-quantized": of_plain,
    "nf4": of_nf4,
    "packed-int": of_plain,
}  # every other kernel makes do with what it is given
