"""Model -> what `inspect SRC` says of it, as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moeconv.cli.parse import show_numbers
from moeconv.codecs import weight_block
from moeconv.model import Model
from moeconv.types import Json, Weight, element_count

# The first row of which a word is in the name below the layer counts.
ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norms", ("norm",)),
    ("shared experts", ("shared_expert", "shared_mlp")),
    ("attention", ("attn", "attention")),
    ("router", ("router", "mlp.gate.", "block_sparse_moe.gate.", "e_score_correction")),
    ("embeddings", ("embed", "wte")),
    ("output head", ("lm_head", "output.weight")),
    ("dense MLP", ("mlp", "feed_forward", "ffn")),
)
E8M0_CODECS = ("mxfp4", "mxfp8")


def role_of(weight: Weight) -> str:
    """Return what a weight is for: experts gate+up, attention, ..., its stack before it."""
    stack = "" if weight.stack == "main" else f"{weight.stack}: "
    names = [name for name, _ in weight.projections]
    if weight.is_expert:
        bias = " bias" if names[0].endswith(".bias") else ""
        return f"{stack}experts {'+'.join(name.removesuffix('.bias') for name in names)}{bias}"
    for role, words in ROLES:
        if any(word in names[0] for word in words):
            return stack + role
    return f"{stack}other"


def role_rows(model: Model) -> list[dict[str, Json]]:
    """Return per role and codec: weights, tensors, bytes, stored dtypes, the decoded shapes."""
    found: dict[tuple[str, str], list[Weight]] = {}
    for weight in model.weights:
        found.setdefault((role_of(weight), weight.codec), []).append(weight)
    rows = []
    for (role, codec), weights in found.items():
        refs = [ref for weight in weights for ref in weight.parts.values()]
        rows.append(
            {
                "role": role,
                "codec": codec,
                "params": dict(weights[0].params),
                "dtypes": sorted({ref.dtype for ref in refs}),
                "shapes": [list(shape) for shape, _ in Counter(w.shape for w in weights).items()],
                "weights": len(weights),
                "tensors": len(refs),
                "nbytes": sum(ref.nbytes for ref in refs),
                "elements": sum(element_count(weight.shape) for weight in weights),
            }
        )
    return sorted(rows, key=lambda row: -int(row["nbytes"]))


def describe_model(model: Model) -> dict[str, Json]:
    """Return everything that `inspect SRC` knows."""
    sizes, source = model.sizes, model.source
    main = [layer for stack, layer in model.expert_layers if stack == "main"]
    all_layers = {w.layer for w in model.weights if w.stack == "main" and w.layer is not None}
    return {
        "kind": "source",
        "path": str(source.root),
        "format": source.kind,
        "family": model.family.name,
        "model_type": _model_type(model),
        "fingerprint": source.fingerprint,
        "layers": {
            "total": len(all_layers),
            "moe": sorted(main),
            "dense": sorted(all_layers - set(main)),
        },
        "experts": sorted(set(model.expert_layers.values())),
        "expert_layers": [
            {"stack": stack, "layer": layer, "experts": count}
            for (stack, layer), count in sorted(model.expert_layers.items())
        ],
        "sizes": {name: _plain(getattr(sizes, name)) for name in sizes._fields},
        "quantization": {
            "method": model.quantization.method,
            "summary": model.quantization.summary,
        },
        "roles": role_rows(model),
        "files": [{"name": name, "nbytes": n} for name, n in sorted(source.sizes.items())],
        "tensors": len(source.tensors),
        "nbytes": sum(ref.nbytes for ref in source.tensors.values()),
        "dropped": [{"name": one.ref.name, "rule": one.rule} for one in model.dropped],
        "auxiliary": list(source.auxiliary),
        "oddities": list(oddities(model)),
        "notes": list(model.notes),
    }


def oddities(model: Model) -> Iterator[str]:
    """Yield what a user may not expect of this model."""
    if model.sizes.tied:
        has_head = any(role_of(weight) == "output head" for weight in model.weights)
        also = "; an output head is stored nevertheless" if has_head else ""
        yield f"tied embeddings: the output head is the embedding{also}"
    for stack, count in Counter(w.stack for w in model.weights if w.stack != "main").items():
        kind = "MTP layers" if "mtp" in stack else f"tensors of {stack}"
        yield f"{kind}: {count} weights beside the decoder's layers"
    counts = Counter(model.expert_layers.values())
    if len(counts) > 1:
        listed = ", ".join(f"{count} in {layers} layers" for count, layers in counts.items())
        yield f"layers differ in their number of experts: {listed}"
    ragged = [weight for weight in model.weights if _is_ragged(weight)]
    if ragged:
        first = ragged[0]
        yield (
            f"ragged blocks: {len(ragged)} {first.codec} weights end in a block that is cut off, "
            f"such as {first.name} [{first.rows}, {first.cols}]"
        )
    with_nan = sorted({w.codec for w in model.weights if _may_hold_nan(w)})
    if with_nan:
        yield (
            f"E8M0 scales ({', '.join(with_nan)}) can say NaN (code 255): convert counts those "
            "that do and keeps them"
        )
    if model.dropped:
        yield f"{len(model.dropped)} activation scales: no part of any weight, not converted"


def _is_ragged(weight: Weight) -> bool:
    block_rows, block_cols = weight_block(weight)
    return bool(weight.rows % block_rows or weight.cols % block_cols)


def _may_hold_nan(weight: Weight) -> bool:
    refs = weight.parts.values()
    return weight.codec in E8M0_CODECS or any(ref.dtype == "F8_E8M0" for ref in refs)


def _model_type(model: Model) -> str | None:
    found = model.source.config.get("model_type")
    return found if isinstance(found, str) else None


def _plain(value: Json) -> Json:
    return list(value) if isinstance(value, tuple) else value


def layers_text(facts: Json) -> str:
    """Return the layers of a model in words: 36 (all MoE), 61 (58 MoE: 3-60, 3 dense: 0-2)."""
    layers = facts["layers"]
    moe, dense = layers["moe"], layers["dense"]
    if not dense:
        return f"{layers['total']}, all with experts"
    return (
        f"{layers['total']}: {len(moe)} with experts ({show_numbers(moe)}), "
        f"{len(dense)} dense ({show_numbers(dense)})"
    )
