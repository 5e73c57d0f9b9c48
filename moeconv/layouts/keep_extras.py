"""`--dtype keep` into the vllm layout: parameters that vLLM makes although no source has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from moeconv.layouts.base import Draft, Fill
from moeconv.layouts.partition import Part
from moeconv.layouts.vllm_rows import Row
from moeconv.layouts.vllm_split import View, text_config
from moeconv.types import Key, Place, Span


class Joined(NamedTuple):
    """One row of a layer: its pieces' places, and the window of each on this rank."""

    row: Row
    name: str
    layer: int | None
    places: tuple[Place, ...]
    windows: tuple[tuple[Part, Part], ...]
    experts: tuple[int, ...] | None

    @property
    def single(self) -> bool:
        """Return whether each expert has one piece: down."""
        return self.experts is not None and len(self.places) == 1


class Scalar(NamedTuple):
    """A number of an attention layer; dtype "": the model's."""

    name: str
    shape: tuple[int, ...]
    value: float
    dtype: str = ""


_CACHE = tuple(Scalar(f"{which}_scale", (), -1.0) for which in ("q", "k", "v", "prob"))
_COMPRESSED = (
    *(Scalar(f"{which}_scale", (1,), 1.0, "F32") for which in "qkv"),
    *(Scalar(f"{which}_zero_point", (1,), 0.0) for which in "qkv"),
)
# (method, MLA attention) -> numbers. vLLM gives MLA none under fp8 and compressed-tensors.
SCALARS: Mapping[tuple[str, bool], tuple[Scalar, ...]] = {
    ("fp8", False): _CACHE,
    ("modelopt", False): _CACHE,
    ("modelopt", True): _CACHE,
    ("compressed-tensors", False): _COMPRESSED,
}


def model_dtype(view: View) -> str:
    """Return the dtype in which vLLM makes a model's parameters by default."""
    for level in (view.config, text_config(view.config)):
        if "float16" in (level.get("dtype"), level.get("torch_dtype")):
            return "F16"
    return "BF16"


def kept_scalars(view: View, row: Row, name: str, layer: int | None, rank: int) -> Iterator[Draft]:
    """Yield the numbers that vLLM adds to an attention layer (of `row`, its scale of queries).

    The checkpoint's own where it has them, else the value with which vLLM makes them.
    """
    mla = ".mla_attn." in row.name
    for scalar in SCALARS.get((view.method, mla), ()):
        place = (view.held or {}).get(Key("main", layer, None, f"self_attn/{scalar.name}"))
        dtype = scalar.dtype or model_dtype(view)
        draft = Draft(
            name[: -len("_q_scale")] + scalar.name,
            dtype,
            scalar.shape,
            1,
            1,
            1,
            rank=rank,
            layer=layer,
        )
        if place is None or "zero_point" in scalar.name:
            yield draft._replace(constant=scalar.value)
            continue
        key = f"self_attn/{scalar.name}"
        one = Span(0, 1)
        fill = Fill("main", layer, key, None, one, one, own_rows=1, own_cols=1)
        yield draft._replace(dtype=str(place.weight.params["dtype"]), fills=(fill,))


def invented(view: View, joined: Joined, parts: Collection[str], rank: int) -> Iterator[Draft]:
    """Yield the parameters of quantized experts that vLLM always has, whatever the source has.

    GPTQ: biases of zero. NVFP4 of compressed-tensors without input scales (W4A16): vLLM leaves
    theirs uninitialised and does not read them; here they are 1.0.
    """
    weight = joined.places[0].weight
    experts = len(joined.experts or ())
    stem = joined.name[: -len("weight")]
    height = sum(rows.extent for rows, _ in joined.windows)
    blank = Draft("", "F32", (), experts, 1, 1, rank=rank, layer=joined.layer)
    if weight.codec == "gptq":
        yield blank._replace(
            name=stem + "bias",
            dtype=model_dtype(view),
            shape=(experts, height),
            rows=height,
            constant=0.0,
        )
    if weight.codec == "nvfp4-ct" and "input_global_scale" not in parts:
        many = len(joined.places)
        yield blank._replace(
            name=stem + "input_global_scale",
            shape=(experts, many) if many > 1 else (experts,),
            rows=many,
            constant=1.0,
        )
