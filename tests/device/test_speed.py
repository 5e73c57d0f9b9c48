"""Every kernel of a GPU is measured; without one in Triton's interpreter, which says nothing."""

from __future__ import annotations

import torch

from moeconv.codecs.amx import FORMS
from moeconv.device.speed import Effort, measure_device
from moeconv.kernels.gpu import KERNELS
from moeconv.measure.cases import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EFFORT = Effort(Tile(128, 256), nbytes=1 << 16, launches=1, repeats=1)


def test_every_kernel_is_measured() -> None:
    said: list[str] = []
    found = measure_device(DEVICE, 2.5, EFFORT, lambda part, detail: said.append(detail))
    assert {key.partition(" ")[0] for key in found.rates} == {*KERNELS, *FORMS}
    assert found.start_seconds == 2.5
    assert min(found.up, found.down, found.copy) > 0
    assert said == ["copies", *(rates.title for rates in found.rates.values())]
    mxfp4 = found.rates["mxfp4"]
    out, moved = 128 * 256 * 2, 128 * 256 * (2 + 17 / 32)  # BF16; a byte per two codes, per 32
    assert mxfp4.roof == found.copy * out / moved  # rounded in this order
