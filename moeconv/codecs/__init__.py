"""The codecs, in detection order."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.codecs.base import Codec
from moeconv.codecs.floats import Floats, Raw
from moeconv.codecs.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from moeconv.codecs.ggml import Ggml
from moeconv.codecs.mxfp4 import Mxfp4
from moeconv.codecs.mxfp8 import Mxfp8
from moeconv.codecs.nvfp4 import Nvfp4Ct, Nvfp4Modelopt

_ALL: tuple[Codec, ...] = (
    Floats(),
    Raw(),
    Mxfp4(),
    Fp8Block(),
    Fp8Channel(),
    Fp8Tensor(),
    Mxfp8(),
    Nvfp4Ct(),
    Nvfp4Modelopt(),
    Ggml(),
)

CODECS: Mapping[str, Codec] = {codec.name: codec for codec in _ALL}
