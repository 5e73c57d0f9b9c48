"""What only a GPU can show: page-locked memory, its bound, a conversion on all that are there."""

from __future__ import annotations

import pytest
import torch

from moeconv import api
from moeconv.device.pinned import pinned_pages
from moeconv.resources import Resources
from tests.checkpoints import Size, quick_directory, write_checkpoint
from tests.device.test_gpu import files_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
VRAM_NBYTES = 64 << 20


def test_pages_are_locked_and_go_back() -> None:
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        memory = pinned_pages(8 << 20, torch.device("cuda"))
        assert torch.from_numpy(memory).is_pinned()
        memory[:] = 1
        del memory
    assert torch.cuda.mem_get_info()[0] >= free - (32 << 20)


@pytest.mark.parametrize("options", [{}, {"layout": "vllm", "tp": 2}, {"dtype": "fp16"}])
def test_a_conversion_gives_the_cpus_bytes_within_its_memory(options: dict[str, object]) -> None:
    with quick_directory() as directory:
        size = Size(layers=2, hidden=512, intermediate=512, experts=16)
        source = write_checkpoint(directory / "src", "gptoss-mxfp4", size).root
        plan = api.plan(source, **options)
        api.convert(plan, directory / "cpu", resources=Resources(device="cpu"))
        torch.cuda.reset_peak_memory_stats()
        resources = Resources(device="cuda", vram_nbytes=VRAM_NBYTES, jobs=8)
        result = api.convert(plan, directory / "gpu", resources=resources)
        assert result.devices[0].startswith("cuda:0")
        assert files_of(directory / "gpu") == files_of(directory / "cpu")
        assert torch.cuda.max_memory_allocated() <= VRAM_NBYTES + (4 << 20)
