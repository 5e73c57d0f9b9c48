"""Which experts each rank of the vllm layout holds, what vLLM demands of that, and what to say."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.errors import Refused
from moeconv.layouts.options import Options
from moeconv.layouts.partition import Rank, all_ranks, divisors, mapped_experts, place_experts
from moeconv.layouts.vllm_rows import Architecture
from moeconv.layouts.vllm_split import View, text_config
from moeconv.types import Json


def rank_experts(rank: Rank, experts: int, options: Options) -> tuple[int, ...]:
    """Return the logical experts in a rank's slots; all of them without --ep."""
    if not options.ep:
        return tuple(range(experts))
    if options.expert_map is not None:
        return mapped_experts(options.expert_map, rank, experts)
    return place_experts(experts, rank, options.placement, options.redundant_experts)


def expert_facts(view: View, options: Options) -> dict[str, Json]:
    """Return per rank its slots' experts, by layer too where layers have different numbers."""
    ranks = all_ranks(options.tp, options.dp)

    def held(experts: int) -> list[list[int]]:
        return [list(rank_experts(rank, experts, options)) for rank in ranks]

    counts = {
        layer: count for (stack, layer), count in view.expert_layers.items() if stack == "main"
    }
    facts: dict[str, Json] = {"experts": held(max(view.expert_layers.values()))}
    if len(set(counts.values())) > 1:
        facts["experts_by_layer"] = {
            str(layer): held(count) for layer, count in sorted(counts.items())
        }
    return facts


def check_experts(view: View, architecture: Architecture, options: Options) -> None:
    """Raise Refused for a placement that vLLM does not have, or asserts away."""
    if options.redundant_experts and options.placement == "round-robin":
        raise Refused(
            "--redundant-experts with --placement round-robin: vLLM places redundant experts "
            "linearly, whatever it is told",
            hint="--placement linear, or an --expert-map",
        )
    if options.redundant_experts and options.expert_map is not None:
        raise Refused(
            "--redundant-experts says nothing beside an --expert-map, which places every slot",
            hint="leave one of them out",
        )
    if not architecture.even_only or options.pads:
        return
    ranks = options.tp * options.dp
    for experts in view.expert_layers.values() if options.ep else ():
        if (experts + options.redundant_experts) % ranks:
            works = ", ".join(str(one) for one in divisors(experts))
            raise Refused(
                f"{experts} experts are not divided by {ranks} ranks, as {architecture.name} needs",
                hint=f"tp x dp that work: {works}",
            )


def shares_heads(view: View, architecture: Architecture, options: Options) -> bool:
    """Return whether vLLM's model class takes so many ranks for its key/value heads."""
    return not architecture.even_only or view.kv_heads >= options.tp


def serving_notes(view: View, architecture: Architecture, options: Options) -> Iterator[str]:
    """Yield what a user must know to serve an output."""
    if not shares_heads(view, architecture, options):
        yield (
            f"vLLM loads {architecture.name} with at most {view.kv_heads} ranks, one for each "
            "key/value head; this output repeats heads for loaders that share them"
        )
    if options.dp > 1:
        yield "vLLM's own sharded_state loader addresses tensor-parallel ranks only (dp 1)"
    if options.placement == "round-robin":
        groups = int(text_config(view.config).get("n_group") or 1)
        yield "serve with --expert-placement-strategy round_robin" + (
            "" if groups > 1 else "; vLLM ignores it for this model, which has no expert groups"
        )
    if options.expert_map is not None:
        yield "vLLM places experts itself: an --expert-map is for loaders that read moeconv.json"
    if options.redundant_experts:
        yield (
            "serve with --enable-eplb and num_redundant_experts "
            f"{options.redundant_experts} in --eplb-config"
        )
    if options.ep and not all(
        rank_experts(rank, count, options)
        for rank in all_ranks(options.tp, options.dp)
        for count in view.expert_layers.values()
    ):
        yield "some ranks hold no expert: vLLM cannot load their empty tensors"
