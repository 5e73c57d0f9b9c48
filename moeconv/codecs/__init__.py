"""The codecs, in detection order."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.codecs.base import Codec
from moeconv.codecs.floats import Floats, Raw
from moeconv.codecs.mxfp4 import Mxfp4

CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (Floats(), Raw(), Mxfp4())}
