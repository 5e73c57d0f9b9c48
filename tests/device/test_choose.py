"""--device and --vram: what is there, what is asked for, and what is refused; no GPU needed."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from moeconv import api
from moeconv.decoding import CpuDecoder
from moeconv.device import choose, driver
from moeconv.device.choose import (
    AUTO_NBYTES,
    DEFAULT_VRAM_NBYTES,
    choose_decoder,
    uses_gpus,
    vram_of,
    wanted_device,
)
from moeconv.device.driver import Card
from moeconv.device.ways import KERNEL, Decoded, decoded_by
from moeconv.errors import Refused, UsageError
from moeconv.tasks import build_tasks
from tests.checkpoints import quick_directory, write_checkpoint

GIB = 1 << 30
MUCH = Decoded(frozenset({KERNEL}), AUTO_NBYTES)
TWO = (Card(0, "H200", 140 * GIB), Card(1, "H100", 80 * GIB))

# A driver of two devices of 80 GiB, of which the second has a name; or one that fails.
DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 7; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 8 ? "second" : "first", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *nbytes, int device) { *nbytes = (size_t)80 << 30; return 0; }
"""


def build(folder: Path, fails: int) -> str:
    """Return the path of a driver library."""
    source, library = folder / "driver.c", folder / f"driver{fails}.so"
    source.write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", f"-DFAILS={fails}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


needs_gcc = pytest.mark.skipif(which("gcc") is None, reason="builds a driver of its own with gcc")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "cards", lambda: TWO)


@needs_gcc
def test_the_driver_names_its_cards(tmp_path: Path) -> None:
    found = driver.cards(build(tmp_path, 0))
    assert found == (Card(0, "first", 80 * GIB), Card(1, "second", 80 * GIB))


@needs_gcc
def test_a_driver_that_fails_or_is_missing_has_no_cards(tmp_path: Path) -> None:
    assert driver.cards(build(tmp_path, 100)) == ()
    assert driver.cards("libno-such-driver.so.1") == ()
    with pytest.raises(OSError):
        ctypes.CDLL("libno-such-driver.so.1")


@pytest.mark.usefixtures("two")
def test_all_cards_or_one_are_wanted() -> None:
    assert wanted_device("cuda").cards == TWO
    assert wanted_device("cuda:1").cards == TWO[1:]
    assert wanted_device("auto", GIB) == choose.Wanted(TWO, False, GIB)
    assert wanted_device("cpu").cards == ()


@pytest.mark.usefixtures("two")
def test_what_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(Refused, match=r"cuda:2; there are cuda:0 \(H200\), cuda:1 \(H100\)"):
        wanted_device("cuda:2")
    with pytest.raises(UsageError, match="tpu"):
        wanted_device("tpu")
    with pytest.raises(Refused, match="--vram"):
        wanted_device("cpu", GIB)


def test_without_a_driver_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "cards", lambda: ())
    assert wanted_device("auto").cards == ()
    with pytest.raises(Refused, match="no NVIDIA driver"):
        wanted_device("cuda")


@pytest.mark.usefixtures("two")
def test_auto_leaves_the_gpu_alone_where_nothing_needs_it() -> None:
    little = Decoded(frozenset({KERNEL}), AUTO_NBYTES - 1)
    for decoded in (None, Decoded(frozenset(), 10 * AUTO_NBYTES), little):
        assert isinstance(choose_decoder(wanted_device("auto"), decoded).decoder, CpuDecoder)
        assert not uses_gpus(wanted_device("auto"), decoded)
    assert uses_gpus(wanted_device("auto"), MUCH)
    assert uses_gpus(wanted_device("cuda:1"), little)


@pytest.mark.usefixtures("two")
def test_torch_without_cuda_is_a_note_with_auto_and_an_error_otherwise() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this torch can use CUDA")
    chosen = choose_decoder(wanted_device("auto"), MUCH)
    assert isinstance(chosen.decoder, CpuDecoder)
    assert "cannot use the GPU" in chosen.note
    with pytest.raises(Refused, match="cannot use the GPU"):
        choose_decoder(wanted_device("cuda"), MUCH)


def test_vram_is_bounded_by_what_is_free() -> None:
    assert vram_of(TWO[0], 100 * GIB, None) == DEFAULT_VRAM_NBYTES
    assert vram_of(TWO[0], 2 * GIB, None) == GIB
    assert vram_of(TWO[0], 2 * GIB, GIB // 2) == GIB // 2
    with pytest.raises(Refused, match="free on cuda:0 H200"):
        vram_of(TWO[0], 2 * GIB, 3 * GIB)


def test_choosing_a_device_imports_no_torch() -> None:
    code = (
        "import sys; from moeconv.device.choose import wanted_device, choose_decoder;"
        "choose_decoder(wanted_device('auto'), None); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_gpu_could_do_of_a_plan() -> None:
    with quick_directory() as directory:
        packed = api.plan(write_checkpoint(directory / "mx", "gptoss-mxfp4").root)
        plain = api.plan(write_checkpoint(directory / "bf", "qwen3moe").root)
    found = decoded_by(build_tasks(packed.weights, packed.files), packed.weights, packed.files)
    assert found.ways == {KERNEL}
    experts = [one for one in packed.weights if one.codec == "mxfp4"]
    assert found.nbytes == sum(one.rows * one.cols * (one.slots or 1) * 2 for one in experts)
    copies = decoded_by(build_tasks(plain.weights, plain.files), plain.weights, plain.files)
    assert copies == Decoded(frozenset(), 0)
