"""`--dtype keep`: which weights stay as they are stored, and the model of their single tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import gcd

from moeconv.codecs import CODECS
from moeconv.codecs.base import Tile
from moeconv.errors import Refused
from moeconv.families.parts import split_packed_part, split_part
from moeconv.grouping import split_layer
from moeconv.layouts.options import Options
from moeconv.layouts.raw import alone, as_stored, beside, taken_apart
from moeconv.model import Dropped, Model
from moeconv.types import Place, TensorRef, Weight

PLAIN = ("float", "raw")
REFINED = "weight_scale_inv"
REFINED_LEAST = 32  # the finest blocks that vLLM's kernels take
GGUF_HINTS: Mapping[str, str] = {
    "hf": "--dtype bf16 decodes them; llama.cpp reads the GGUF file as it is",
    "ktransformers": "--dtype int4, int8 or bf16 decodes them; kt-kernel reads the GGUF file as it "
    "is (--kt-method LLAMAFILE)",
}
CACHE_PARTS = ("q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point")


def is_quantized(weight: Weight) -> bool:
    """Return whether a weight has to be decoded to be numbers."""
    return weight.codec not in PLAIN


def keeps_quantization(model: Model, options: Options) -> bool:
    """Return whether the output holds quantized weights as they are; Refused where only some.

    One config.json speaks of all of them: it cannot say that half were decoded.
    """
    quantized = [weight for weight in model.weights if is_quantized(weight)]
    kept = [weight for weight in quantized if _wanted(weight, options) == "keep"]
    if not kept:
        return False
    block = next((weight for weight in kept if weight.codec == "ggml"), None)
    if block is not None:
        ref = next(iter(block.parts.values()))
        raise Refused(
            f"'{ref.name}' is {ref.dtype}: safetensors has no dtype for GGUF's blocks",
            where=ref.file,
            hint=GGUF_HINTS.get(options.layout, GGUF_HINTS["hf"]),
        )
    if len(kept) < len(quantized):
        decoded = next(weight for weight in quantized if _wanted(weight, options) != "keep")
        raise Refused(
            f"'{kept[0].name}' would stay quantized and '{decoded.name}' would be decoded: "
            "config.json cannot say so",
            hint="--dtype keep alone keeps both; without keep both are decoded",
        )
    return True


def _wanted(weight: Weight, options: Options) -> str:
    return options.dtype if weight.is_expert else options.dense


def kept_model(model: Model, options: Options) -> Model:
    """Return the model with every weight that is kept taken apart into its stored tensors."""
    quantized = keeps_quantization(model, options)
    weights: list[Weight] = []
    for weight in model.weights:
        if _wanted(weight, options) != "keep" or weight.codec == "ggml":
            weights.append(weight)
        elif options.layout == "hf":
            gguf = str(next(iter(weight.parts.values())).file).endswith(".gguf")
            weights += [weight] if gguf else as_stored(weight)
        elif is_quantized(weight):
            stored = CODECS[weight.codec].tiles(weight.params)
            weights += taken_apart(weight, kept_tiles(weight, options), stored)
        else:
            weights.append(weight)
    dropped: tuple[Dropped, ...] = model.dropped
    if quantized:
        weights += kept_activations(model)
        dropped = ()
    places = {
        key: Place(weight, slot, rows)
        for weight in weights
        for slot in range(weight.slots or 1)
        for key, rows in weight.keys(slot)
    }
    return replace(model, weights=tuple(weights), places=places, dropped=dropped)


def kept_tiles(weight: Weight, options: Options) -> Mapping[str, Tile]:
    """Return the tiles of a weight as the layout wants them: scales on a finer grid if need be."""
    tiles = CODECS[weight.codec].tiles(weight.params)
    grain = refined_block(weight, options) if options.layout == "vllm" else 0
    if not grain:
        return tiles
    return {**tiles, REFINED: tiles[REFINED]._replace(rows=grain, cols=grain)}


def refined_block(weight: Weight, options: Options) -> int:
    """Return the side of the finer blocks that vLLM gives FP8 experts whose ranks cut the blocks.

    0 where it gives none. As refine_fp8_moe_block_shape of vLLM 0.32; compressed-tensors has none.
    """
    if not weight.is_expert or weight.codec != "fp8-block" or REFINED not in weight.parts:
        return 0
    inner, hidden = weight.rows // len(weight.projections), weight.cols
    if weight.projections[0][0] == "down":
        inner, hidden = hidden, inner
    ranks = 1 if options.ep else options.tp * options.dp
    block = int(weight.params["block_rows"]), int(weight.params["block_cols"])
    mine, rest = divmod(inner, ranks)
    whole = mine % block[0] == 0 and (ranks == 1 or mine % block[1] == 0)
    if rest or whole or options.pad_intermediate:
        return 0
    grain = gcd(*block, mine, hidden)
    return grain if grain >= REFINED_LEAST else 0


def kept_activations(model: Model) -> Iterator[Weight]:
    """Yield the activation and cache scales that decoding would drop, each as a weight."""
    owners = _owners(model.weights)
    for ref in (drop.ref for drop in model.dropped):
        base, part = _base(ref, owners)
        owner = owners.get(base)
        place = split_layer(ref.name)
        if owner is not None and part not in CACHE_PARTS:
            yield beside(owner, part, ref)
        elif part in CACHE_PARTS and place.layer is not None:
            # self_attn.k_proj.k_scale and self_attn.k_scale speak of the same cache.
            module = place.rest.split(".")[0]
            yield alone(model_stack(model, place.layer), place.layer, f"{module}/{part}", ref)
        else:
            yield alone("main", place.layer, place.rest, ref)


def model_stack(model: Model, layer: int) -> str:
    """Return "mtp" for layers after the last one."""
    layers = model.sizes.layers
    return "mtp" if layers is not None and layer >= layers else "main"


def _owners(weights: Iterable[Weight]) -> Mapping[str, Weight]:
    owners: dict[str, Weight] = {}
    for weight in weights:
        for ref in weight.parts.values():
            base, part = split_part(ref.name)
            owners[base if part else split_packed_part(ref.name)[0]] = weight
    return owners


def _base(ref: TensorRef, owners: Mapping[str, Weight]) -> tuple[str, str]:
    base, part = split_part(ref.name)
    if part:
        return base, part
    return split_packed_part(ref.name)
