"""GPTQ: codes packed along the columns, zero points along the rows, one scale per group.

Layout and formula: GPTQModel 7.7.0, nn_modules/qlinear/__init__.py (pack_original, dequantize).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeconv.codecs import bits as b
from moeconv.codecs.base import QuantScheme, Tile, Window
from moeconv.errors import BadSource, IncompleteModel, ShapeMismatch
from moeconv.types import Params, TensorRef

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)
PARTS = {"qweight", "qzeros", "scales", "g_idx"}
# checkpoint_format -> what is added to a stored zero point
ZERO_OFFSETS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Gptq:
    """w[n,k] = s[g,n] * (q[k,n] - z[g,n]), g = g_idx[k] in activation order, else k // group_size.

    Parameters: bits, group_size, groups (per row), rows, sym, act_order (g_idx is looked up),
    g_idx (there is one), zeros ("packed", "empty" [G, 0], "absent"), zero_offset (v1: 1, v2: 0).
    """

    name: str = "gptq"
    reference_nbytes: int = 28

    def tiles(self, params: Params) -> Mapping[str, Tile]:
        elements, words = b.dense_run(int(params["bits"]))
        cols = b.group_cols(int(params["group_size"]))
        groups = 1
        if params["act_order"]:  # any column may take any group
            cols, groups = None, int(params["groups"])
        tiles = {
            "qweight": Tile(("I32",), cols=elements, elements=words, axes="cr"),
            "scales": Tile(b.SCALE_DTYPES, cols=cols, elements=groups, axes="cr"),
        }
        if params["zeros"] != "absent":
            stored = words if params["zeros"] == "packed" else 0
            tiles["qzeros"] = Tile(("I32",), elements, cols, "cr", groups, pack_rows=stored)
        if params["g_idx"]:
            tiles["g_idx"] = Tile(("I32", "I64"), axes="c")
        return tiles

    def detect(self, found: Mapping[str, TensorRef], scheme: QuantScheme) -> Params | None:
        if not {"qweight", "scales"} <= set(found) <= PARTS:
            return None
        if scheme.method == "":
            raise BadSource(
                f"'{found['qweight'].name}' is quantized, but no config says how: "
                "GPTQ and AWQ use the same tensor names",
                hint="add the quantization_config of the model to its config.json",
            )
        if scheme.method != self.name:
            return None
        params = _params(found, scheme.values)
        b.check_headers(found, self.tiles(params), self.shape(found, params))
        return params

    def settle(
        self, found: Mapping[str, TensorRef], params: Params, payloads: Mapping[str, np.ndarray]
    ) -> Params:
        """Return params with the zero_offset that the payload of qzeros shows."""
        if params["zeros"] != "packed":
            return params
        try:
            convention = zero_convention(payloads["qzeros"], params)
        except BadSource as error:
            ref = found["qzeros"]
            raise BadSource(
                f"'{ref.name}': {error.what}", where=ref.file, hint=error.hint
            ) from None
        return {**params, "zero_offset": 1 if convention == "v1" else 0}

    def shape(self, found: Mapping[str, TensorRef], params: Params) -> tuple[int, ...]:
        *lead, words, rows = found["qweight"].shape
        if "g_idx" in found:
            return (*lead, rows, found["g_idx"].shape[-1])
        return (*lead, rows, words * b.WORD_BITS // int(params["bits"]))

    def decode(
        self, parts: Mapping[str, torch.Tensor], window: Window, params: Params
    ) -> torch.Tensor:
        """Return float32 [R, C] from int32 qweight [C*bits/32, R] and qzeros [G, R*bits/32],
        scales [G, R] and g_idx [1, C]."""
        bits = int(params["bits"])
        run = b.dense_run(bits)
        codes = b.unpack(parts["qweight"].T, bits, run, window.cols)  # [R, C]
        zeros: torch.Tensor | int = 1 << (bits - 1)
        if params["zeros"] == "packed":
            zeros = b.unpack(parts["qzeros"], bits, run, window.rows).T  # [R, G]
            zeros = zeros + int(params["zero_offset"])
            if params["sym"]:
                _check_symmetric(zeros, bits)
        return b.scaled(codes, zeros, parts["scales"].T, _groups(parts, window, params))


def zero_convention(qzeros_words: np.ndarray, params: Params) -> str:
    """Return "v1" (z = stored + 1) or "v2" (z = stored) of int32 qzeros [..., G, R*bits/32].

    Symmetric zero points are 2^(bits-1) by definition, so there the payload decides: some
    releases hold v2 zeros under checkpoint_format "gptq" (vllm-project/vllm#38966).
    """
    declared = "v1" if params["zero_offset"] else "v2"
    if not params["sym"]:
        return declared
    stored = np.unique(stored_zeros(qzeros_words, params))
    middle = 1 << (int(params["bits"]) - 1)
    for zero, convention in ((middle - 1, "v1"), (middle, "v2")):
        if stored.size == 1 and stored[0] == zero:
            return convention
    if stored.size == 0:
        return declared
    raise BadSource(
        f"sym is true, but the stored zero points are {stored[:4].tolist()}, "
        f"neither all {middle - 1} (v1) nor all {middle} (v2)",
        hint="the config's 'sym' or 'bits' is wrong, or the tensor is damaged",
    )


def saturated_zeros(qzeros_words: np.ndarray, params: Params) -> int:
    """Return how many stored zero points are 2^bits - 1, which v1 readers understand differently.

    Written for z = 0. Here and in vLLM's exllama kernel they are read as 2^bits; AutoGPTQ 0.7.1
    and GPTQModel 7.7.0's model_dequant wrap them to 0; GPTQModel's TorchLinear adds 1 to every
    field of the packed word at once, where the carry also moves the next row's zero point.
    """
    top = (1 << int(params["bits"])) - 1
    return int((stored_zeros(qzeros_words, params) == top).sum())


def _check_symmetric(zeros: torch.Tensor, bits: int) -> None:
    """Raise where zero points are not the middle: planning looks at a sample of the tensors."""
    if not bool((zeros == 1 << (bits - 1)).all()):
        raise not_symmetric(zeros.cpu().numpy(), bits)


def not_symmetric(zeros: np.ndarray, bits: int) -> BadSource:
    """Return the error for zero points that are not all in the middle."""
    return BadSource(
        f"sym is true, but there are zero points {np.unique(zeros)[:4].tolist()}, "
        f"not {1 << (bits - 1)} alone",
        hint="the tensor is damaged, or of another checkpoint_format than the others",
    )


def check_payload(parts: Mapping[str, np.ndarray], window: Window, params: Params) -> None:
    """Raise BadSource for zero points that are not symmetric, and groups that are not as declared.

    parts: int32 qzeros [G, R*bits/32], scales [G, R], g_idx [1, C], those that there are.
    """
    if params["zeros"] == "packed" and params["sym"]:
        _check_middle(parts["qzeros"], window, params)
    if params["act_order"]:
        b.check_groups(parts["g_idx"], len(parts["scales"]))
    elif "g_idx" in parts:
        _check_order(parts["g_idx"], window, int(params["group_size"]))


def _check_middle(qzeros: np.ndarray, window: Window, params: Params) -> None:
    """Raise BadSource where the zero points of a symmetric weight are not all in the middle."""
    bits, offset = int(params["bits"]), int(params["zero_offset"])
    middle = 1 << (bits - 1)
    if b.WORD_BITS % bits == 0:  # whole words of the usual zero point need no closer look
        usual = sum((middle - offset) << shift for shift in range(0, b.WORD_BITS, bits))
        if (qzeros.view(np.uint32) == usual).all():
            return
    zeros = stored_zeros(qzeros, {**params, "rows": window.rows}) + offset
    if (zeros != middle).any():
        raise not_symmetric(zeros, bits)


def _check_order(g_idx: np.ndarray, window: Window, group_size: int) -> None:
    """Raise BadSource where the groups are not those of columns in order."""
    columns = np.arange(window.col_start, window.col_stop)
    groups = np.zeros_like(columns) if group_size == b.ONE_GROUP else columns // group_size
    if (g_idx.reshape(-1) != groups).any():
        raise not_in_order()


def stored_zeros(words: np.ndarray, params: Params) -> np.ndarray:
    """Return int64 zero points [..., G, R] as stored, of int32 words [..., G, R*bits/32]."""
    bits = int(params["bits"])
    return b.unpack_peeked(words, bits, b.dense_run(bits), int(params["rows"]))


def _params(found: Mapping[str, TensorRef], values: Params) -> Params:
    qweight = found["qweight"]
    label = str(values.get("checkpoint_format") or "gptq").lower()
    if label not in ZERO_OFFSETS:
        raise b.unsupported(f"GPTQ of checkpoint_format '{label}'", qweight, "gptq, gptq_v2")
    if values.get("pack_dtype", "int32") != "int32":
        raise b.unsupported(f"GPTQ of pack_dtype {values['pack_dtype']}", qweight, "int32")
    bits = b.required_int(values, "bits", qweight)
    if bits not in BITS:
        raise b.unsupported(f"{bits}-bit GPTQ", qweight, "2, 3, 4 and 8 bits")
    b.stacked_axes(qweight)
    words, rows = qweight.shape[-2:]
    run_words = b.dense_run(bits).words
    if "g_idx" not in found and words % run_words:
        raise ShapeMismatch(
            f"'{qweight.name}' has {words} words along its columns, "
            f"expected a multiple of {run_words} for {bits} bits",
            where=qweight.file,
        )
    group_size = b.group_size_of(values, qweight)
    cols = found["g_idx"].shape[-1] if "g_idx" in found else words * b.WORD_BITS // bits
    sym = values.get("sym") is True
    return {
        "bits": bits,
        "group_size": group_size,
        "groups": b.group_count(cols, group_size),
        "rows": rows,
        "sym": sym,
        "act_order": _act_order(found, values, group_size),
        "g_idx": "g_idx" in found,
        "zeros": _zeros_kind(found, sym),
        "zero_offset": ZERO_OFFSETS[label],
    }


def _act_order(found: Mapping[str, TensorRef], values: Params, group_size: int) -> bool:
    if group_size == b.ONE_GROUP:
        return False
    declared = bool(values.get("desc_act", "g_idx" in found))
    if declared and "g_idx" not in found:
        name = found["qweight"].name
        raise IncompleteModel(
            f"desc_act is true, but '{name}' has no g_idx beside it", where=found["qweight"].file
        )
    return declared


def _zeros_kind(found: Mapping[str, TensorRef], sym: bool) -> str:
    kind = "absent"
    if "qzeros" in found:
        kind = "packed" if found["qzeros"].shape[-1:] != (0,) else "empty"
    if kind != "packed" and not sym:
        name = found["qweight"].name
        raise IncompleteModel(
            f"'{name}' has no zero points (qzeros {kind}), and its config does not say sym",
            where=found["qweight"].file,
        )
    return kind


def _groups(parts: Mapping[str, torch.Tensor], window: Window, params: Params) -> torch.Tensor:
    """Return int64 [C] groups; refuses a g_idx that the config says to be in order and is not."""
    group_size, device = int(params["group_size"]), parts["qweight"].device
    if params["act_order"]:
        return b.column_groups(window, group_size, parts["g_idx"], device)
    index = b.column_groups(window, group_size, None, device)
    if "g_idx" in parts:
        first = 0 if group_size == b.ONE_GROUP else window.col_start // group_size
        if not bool((parts["g_idx"].reshape(-1).long() == index + first).all()):
            raise not_in_order()
    return index


def not_in_order() -> BadSource:
    """Return the error for an activation order that the config does not know of."""
    return BadSource(
        "g_idx is not in order, although the config says desc_act false",
        hint="set desc_act to true in the quantization config if the tensor is right",
    )
