"""The codecs, in detection order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from moeconv.codecs import gptq, int_quantized, packed_int
from moeconv.codecs.awq import Awq
from moeconv.codecs.base import Codec, Window, block_of
from moeconv.codecs.floats import Floats, Raw, Repeated
from moeconv.codecs.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from moeconv.codecs.ggml import Ggml
from moeconv.codecs.gptq import Gptq
from moeconv.codecs.int_quantized import IntQuantized
from moeconv.codecs.mxfp4 import Mxfp4
from moeconv.codecs.mxfp8 import Mxfp8
from moeconv.codecs.nf4 import Nf4
from moeconv.codecs.nvfp4 import Nvfp4Ct, Nvfp4Modelopt
from moeconv.codecs.packed_int import PackedInt
from moeconv.types import Params, Weight

_ALL: tuple[Codec, ...] = (
    Floats(),
    Raw(),
    Repeated(),
    Mxfp4(),
    Fp8Block(),
    Fp8Channel(),
    Fp8Tensor(),
    Mxfp8(),
    Nvfp4Ct(),
    Nvfp4Modelopt(),
    Nf4(),
    PackedInt(),
    IntQuantized(),
    Gptq(),
    Awq(),
    Ggml(),
)

CODECS: Mapping[str, Codec] = {codec.name: codec for codec in _ALL}

# What reads a payload before it is decoded, and raises BadSource or ShapeMismatch for what headers
# did not show. Takes the parts of a window as kernels do; of scales only the shape matters.
Check = Callable[[Mapping[str, np.ndarray], Window, Params], None]
PAYLOAD_CHECKS: Mapping[str, Check] = {
    "gptq": gptq.check_payload,
    "int-quantized": int_quantized.check_payload,
    "packed-int": packed_int.check_payload,
}


def weight_block(weight: Weight) -> tuple[int, int]:
    """Return the block of a weight, rows x cols, that can only be decoded as a whole."""
    tiles = CODECS[weight.codec].tiles(weight.params).values()
    return block_of(tuple(tiles), weight.rows, weight.cols)
