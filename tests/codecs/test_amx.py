"""kt-kernel's packed forms: by hand, by the closed form, and as kt-kernel itself wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeconv.codecs import amx
from tests import amx_oracle

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ktransformers"
FORMS = sorted(amx.FORMS)
PROJECTIONS = ("gate", "up", "down")

# value -> code, in a row whose largest is 127 (scale 1) or 112 (scale 1): halves go to the even
# code for INT8, and INT4 rounds a second time, halves away from zero.
INT8_CODES = {
    127.0: 127,
    -127.0: -127,
    0.5: 0,
    1.5: 2,
    2.5: 2,
    -0.5: 0,
    -1.5: -2,
    -0.0: 0,
    63.5: 64,
    62.5: 62,
    1e-30: 0,
}
INT4_CODES = {
    112.0: 7,
    -112.0: -7,
    8.0: 1,
    7.0: 0,
    7.5: 1,  # 7.5 -> 8 -> 1
    -7.5: -1,
    8.5: 1,
    24.0: 2,
    23.0: 1,
    -24.0: -2,
    -0.0: 0,
    104.0: 7,
    103.0: 6,
}


@pytest.mark.parametrize(
    ("form", "cases"), [("amxint8", INT8_CODES), ("amxint4", INT4_CODES)], ids=["int8", "int4"]
)
def test_codes_by_hand(form: str, cases: dict[float, int]) -> None:
    values = np.array([list(cases)], np.float32)
    scales = amx.row_scales(values, amx.FORMS[form])
    assert scales.tolist() == [1.0]
    assert amx.quantize(values, scales, amx.FORMS[form])[0].tolist() == list(cases.values())


def test_places_by_hand() -> None:
    """Element (n, k) -> byte, for a few that show each step of the order."""
    codes = np.zeros((96, 3648), np.int8)  # the second block has 32 rows, and 64 columns
    for value, (row, col) in enumerate(PLACES, 1):
        codes[row, col] = value
    packed = amx.pack(codes, amx.FORMS["amxint8"])
    assert {int(packed[at]): int(at) for at in np.flatnonzero(packed)} == dict(
        enumerate(PLACES.values(), 1)
    )


PLACES = {
    (0, 0): 0,
    (0, 3): 3,
    (1, 0): 4,
    (0, 4): 64,
    (16, 0): 1024,
    (0, 64): 2048,
    (32, 0): 32 * 3584,
    (0, 3584): 64 * 3584,
    (64, 0): 64 * 3648,
    (64, 3584): 64 * 3648 + 32 * 3584,
}


def test_nibbles_by_hand() -> None:
    codes = np.zeros((32, 128), np.int8)
    codes[0, 0], codes[0, 64], codes[1, 127] = -7, 3, -1
    packed = amx.pack(codes, amx.FORMS["amxint4"])
    assert {int(at): int(packed[at]) for at in np.flatnonzero(packed)} == {
        0: 0x39,
        15 * 64 + 4 + 3: 0xF0,
    }


def cases() -> list[tuple[int, int]]:
    return [(32, 128), (96, 256), (160, 128), (64, 3584 + 128), (128, 384)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", cases(), ids=str)
def test_equals_the_closed_form(form: str, shape: tuple[int, int]) -> None:
    bits = random_rows(shape)
    packed, scales = amx.encode(amx_oracle.floats(bits), amx.FORMS[form])
    expected_bytes, expected_scales = amx_oracle.encode(bits, form)
    assert packed.tobytes() == expected_bytes
    assert scales.tobytes() == expected_scales.tobytes()


def random_rows(shape: tuple[int, int]) -> np.ndarray:
    """Return BF16 bits: rows of all sizes, zeros, -0, one value alone, steps that tie."""
    random = np.random.default_rng(shape)
    values = random.standard_normal(shape) * 10.0 ** random.integers(-30, 30, (shape[0], 1))
    values[3], values[5] = 0.0, -0.0
    values[7] = 0.0
    values[7, 1] = -3.0
    values[9] = random.integers(-254, 255, shape[1]) / 2  # halves of a scale near 1
    values[9, 0] = 127
    values[11] = random.integers(-224, 225, shape[1]) / 2
    values[11, 0] = -112
    return amx_oracle.bf16(values)


@pytest.mark.parametrize("form", FORMS)
def test_tiny_rows_keep_their_values(form: str) -> None:
    """Where 1 / scale overflows float32 the codes are still the nearest ones."""
    values = np.zeros((32, 128), np.float32)
    values[0, :4] = np.array([1.0, -0.5, 0.25, 0.0], np.float32) * np.float32(2.0**-125)
    values[1, :2] = amx_oracle.floats(np.array([1, 0x8001], np.uint16))  # BF16's smallest
    scales = amx.row_scales(values, amx.FORMS[form])
    codes = amx.quantize(values, scales, amx.FORMS[form])
    most, half, quarter = (127, -64, 32) if form == "amxint8" else (7, -4, 2)
    assert codes[0, :4].tolist() == [most, half, quarter, 0]
    assert codes[1, :3].tolist() == [most, -most, 0]


@pytest.mark.parametrize("form", FORMS)
def test_decode_is_within_half_a_step(form: str) -> None:
    values = amx_oracle.floats(random_rows((160, 256)))
    packed, scales = amx.encode(values, amx.FORMS[form])
    decoded = amx.decode(packed, scales, values.shape[1], amx.FORMS[form])
    step = scales[:, None] * (1 if form == "amxint8" else 16)
    # INT4 rounds twice: half an 8-bit step more
    slack = 0.5 if form == "amxint8" else 0.5 + 0.5 / 16
    assert (np.abs(decoded - values) <= step * slack * 1.0001).all()
    assert np.abs(decoded).max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_equals_what_kt_kernel_wrote(form: str) -> None:
    """kt-kernel 0.7.2's converter and engine, two NUMA parts."""
    written = {}
    for path in sorted((FIXTURES / f"{form.removeprefix('amx')}-numa2").glob("*.safetensors")):
        written.update(amx_oracle.stored(path))
    experts = {key: data for key, (_, _, data) in written.items() if "_exps." in key}
    source = amx_oracle.stored(FIXTURES / "bf16" / "model-00001-of-00001.safetensors")
    compared = 0
    for expert in range(2):
        for name in PROJECTIONS:
            _, shape, data = source[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"]
            bits = np.frombuffer(data, np.uint16).reshape(shape)
            for numa in range(2):
                window = slice(numa * 256, numa * 256 + 256)
                slice_bits = bits[:, window] if name == "down" else bits[window]
                packed, scales = amx.encode(amx_oracle.floats(slice_bits), amx.FORMS[form])
                key = f"blk.0.ffn_{name}_exps.{expert}.numa.{numa}"
                assert experts[f"{key}.weight"] == packed.tobytes(), key
                assert experts[f"{key}.scale"] == scales.tobytes(), key
                compared += 1
    assert len(experts) == 2 * compared == 24
