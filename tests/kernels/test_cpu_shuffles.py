"""Look-ups of 16 codes: by the shuffle and by the portable form, and kernels compiled with each."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import moeconv
from moeconv.kernels.cpu import shuffles
from moeconv.kernels.cpu.base import BYTES_IN, BYTES_OUT
from moeconv.kernels.cpu.cache import cpu_features
from tests.kernels.assembly import assert_one_run

ROOT = Path(moeconv.__file__).parents[1]
HAS_SHUFFLE = "+ssse3" in cpu_features()
PERMUTES = [
    pytest.param(shuffles.pshufb, marks=pytest.mark.skipif(not HAS_SHUFFLE, reason="needs SSSE3")),
    shuffles.portable,
]
# What some kernels make of random parts, on any CPU.
USE = """
import sys
from hashlib import blake2b
import numpy as np
from moeconv.codecs.base import Window
from moeconv.kernels.cpu import KERNELS, shuffles
rng, found, window = np.random.default_rng(0), blake2b(digest_size=8), Window(0, 5, 0, 94)
def draw(*shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)
for dtype, kind in (("BF16", np.uint16), ("F16", np.uint16), ("F32", np.float32)):
    out = np.zeros((5, 94), kind)
    parts = {"codes": draw(5, 47), "scales": draw(5, 3)}
    KERNELS["mxfp4"](parts, window, {"codes": "codes", "scales": "scales"}, dtype, out)
    found.update(out.tobytes())
    scales = {"weight_scale": draw(5, 6), "weight_scale_2": np.full((1, 1), 0.37, np.float32)}
    eight = {"weight": draw(5, 94) % np.uint8(120), "weight_scale": draw(5, 3) % 9 + np.uint8(120)}
    for form in ("F8_E4M3", "F8_E5M2"):
        params = {"dtype": form, "scale": "weight_scale"}
        KERNELS["mxfp8"](eight, window, params, dtype, out)
        found.update(out.tobytes())
    KERNELS["nvfp4-modelopt"]({"weight": draw(5, 47), **scales}, window, {}, dtype, out)
    found.update(out.tobytes())
    flat = {"rows": 5, "cols": 94, "blocksize": 40, "nested_blocksize": 0, "nested_offset": 0.0}
    tables = {"weight.absmax": draw(1, 12), "weight.quant_map": draw(1, 16)}
    parts = {part: table.astype("f4") for part, table in tables.items()}
    KERNELS["nf4"]({"weight": draw(235, 1), **parts}, window, flat, dtype, out)
    found.update(out.tobytes())
window, out = Window(0, 8, 0, 64), np.zeros((8, 64), np.uint16)
params = {"bits": 4, "group_size": 32, "zeros": "absent", "packing": "dense", "act_order": False}
parts = {"weight_packed": draw(8, 32).view(np.int32), "weight_scale": draw(8, 2).astype("f4")}
KERNELS["packed-int"](parts, window, params, "BF16", out)
found.update(out.tobytes())
parts = {"qweight": draw(64, 4).view(np.int32), "scales": draw(2, 8).astype("f4")}
KERNELS["awq"](parts, window, {"group_size": 32, "zeros": "absent"}, "BF16", out)
found.update(out.tobytes())
for name, nbytes in (("Q5_0", 22), ("Q8_0", 34), ("IQ4_NL", 18)):
    params = {"type": name, "block_cols": 32, "block_nbytes": nbytes}
    KERNELS["ggml"]({"weight": draw(8, 2 * nbytes)}, window, params, "BF16", out)
    found.update(out.tobytes())
print(shuffles.PERMUTE.__name__, shuffles.HAS_WORDS, found.hexdigest())
"""


def compiled(look_up: Any) -> Any:
    @numba.njit((BYTES_IN.made(), BYTES_IN.made(), BYTES_OUT.made()))
    def run(codes: Any, tables: Any, out: Any) -> None:
        for at in range(0, 64, 2):
            look_up(codes, tables, out, (at + 1, at + 3, 5 + at * 64))

    return run


FORMS = [shuffles.BYTES, shuffles.LOW_FIRST, shuffles.HIGH_FIRST]
TAKEN = [
    (shuffles.LOW_FIRST, 16, shuffles.nibbles_to_16),
    (shuffles.LOW_FIRST, 32, shuffles.more_nibbles_to_16),
    (shuffles.HIGH_FIRST, 16, shuffles.turned_to_16),
    (shuffles.BYTES, 16, shuffles.codes_to_16),
    (shuffles.BYTES, 32, shuffles.more_codes_to_16),
]


def check_look_up(look_up: Any, form: int, lanes: int, nbytes: int, steps: tuple[int, int]) -> None:
    """Compare at places off any alignment; what lies beside the outputs stays.

    steps: in a table from an output to the next, and from its one byte to the next.
    """
    rng, count = np.random.default_rng(0), lanes if form == shuffles.BYTES else lanes // 2
    codes = rng.integers(0, 256, 63 + count, dtype=np.uint8)
    tables = rng.integers(0, 256, 65 + 16 * nbytes, dtype=np.uint8)
    out = np.full(5 + 64 * 64, 7, np.uint8)
    wanted = out.copy()
    for at in range(0, 64, 2):
        taken = codes[at + 1 : at + 1 + count]
        pairs = [taken & 15, taken >> 4][:: -1 if form == shuffles.HIGH_FIRST else 1]
        order = taken & 15 if form == shuffles.BYTES else np.stack(pairs, axis=-1).ravel()
        low = at + 3 + order.astype(int) * steps[0]
        found = np.stack([tables[low + plane * steps[1]] for plane in range(nbytes)], axis=-1)
        begin = 5 + at * 64
        wanted[begin : begin + nbytes * lanes] = found.ravel()
    compiled(look_up)(codes, tables, out)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("permute", PERMUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nbytes", [2, 4])
def test_sixteen_codes(permute: shuffles.Permute, form: int, nbytes: int) -> None:
    check_look_up(shuffles.look_up_of(form, nbytes, permute), form, 16, nbytes, (1, 16))


@pytest.mark.parametrize(("form", "lanes", "look_up"), TAKEN)
def test_the_look_ups_that_kernels_take(form: int, lanes: int, look_up: Any) -> None:
    """Whatever way their tables lie: an output's bytes are STRIDE and UPPER apart."""
    check_look_up(look_up, form, lanes, 2, (shuffles.STRIDE, shuffles.UPPER))


@pytest.mark.skipif(not shuffles.HAS_WORDS, reason="needs AVX-512BW")
@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("form", FORMS)
def test_a_look_up_of_words_is_one_instruction(form: int, lanes: int) -> None:
    run = compiled(shuffles.word_look_up_of(form, lanes))
    (assembly,) = run.inspect_asm().values()
    assert_one_run(assembly, (r"\svpermw\s.*%[yz]mm",))


@pytest.mark.skipif(not HAS_SHUFFLE, reason="needs SSSE3")
@pytest.mark.parametrize("form", FORMS)
def test_a_look_up_is_a_shuffle(form: int) -> None:
    run = compiled(shuffles.look_up_of(form, 2))
    (assembly,) = run.inspect_asm().values()
    assert_one_run(assembly, (r"\sv?pshufb\s",))


def test_features_follow_what_numba_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "" not in cpu_features()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert cpu_features() == {""}
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2,-ssse3")
    assert cpu_features() == {"+sse2", "-ssse3"}


def outputs_on(**variables: str) -> list[str]:
    """Return which form of the look-up a fresh interpreter takes, and a digest of outputs."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, "-c", USE], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86-64 CPU")
@pytest.mark.parametrize(
    ("cpu", "form"), [("generic", ["portable", "False"]), ("nehalem", ["pshufb", "False"])]
)
def test_kernels_of_other_cpus(cpu: str, form: list[str]) -> None:
    """numba compiles for a CPU without look-ups of words, or of bytes; the outputs are the same.

    What it compiled is kept beside the rest, under another key: it takes 20 s once.
    """
    here = outputs_on()
    chosen = {"NUMBA_CPU_NAME": cpu}
    if cpu != "generic":
        chosen["NUMBA_CPU_FEATURES"] = "+sse4.2,+ssse3"
    *found, digest = outputs_on(**chosen)
    assert found == form
    assert digest == here[-1]
    assert here[0] == ("pshufb" if HAS_SHUFFLE else "portable")
