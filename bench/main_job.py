"""The main job: gpt-oss MXFP4 to hf and to eight ranks, beside what the disk and others can do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bench import aims, contest, profiles
from bench.aims import Aim
from bench.architectures import KINDS, Size
from bench.checkpoints import source
from bench.contest import DIRECT, Outcome, Turn, Way
from bench.measure import DURABLE, Cost, convert, run_python
from bench.profiles import Trace

HF, TP8 = "moeconv, `--layout hf`", "moeconv, `--layout vllm --tp 8`"
TRANSFORMERS = "transformers: dequantize, save_pretrained"
OPTIONS: Mapping[str, tuple[str, ...]] = {HF: (), TP8: ("--layout", "vllm", "--tp", "8")}
PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
)
model.save_pretrained(sys.argv[2])
"""


def transformers(turn: Turn) -> Cost:
    """Measure transformers, which reads through memory maps."""
    cost = run_python(PEER + DURABLE, [str(turn.source), str(turn.target)])
    return cost._replace(read_chars=0)


def ways(*, peer: bool) -> list[Way]:
    """Return who takes part."""
    loaded = (
        "`from_pretrained(quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16)`,"
        " `save_pretrained`, fsync"
    )
    return [
        Way(HF, lambda turn: convert(turn.source, turn.target), "`moeconv convert gpt-oss OUT`"),
        contest.direct(),
        Way(
            TP8,
            lambda turn: convert(turn.source, turn.target, *OPTIONS[TP8]),
            "`moeconv convert gpt-oss OUT --layout vllm --tp 8`",
        ),
        contest.copied(),
        *([Way(TRANSFORMERS, transformers, loaded, once=True)] if peer else []),
    ]


def aimed(outcome: Outcome, traces: Mapping[str, Trace]) -> list[Aim]:
    """Return the aims of this job; `traces`: of our ways."""
    titles = {HF: "speed against the O_DIRECT write, hf", TP8: "the same, eight ranks"}
    found = [
        Aim(
            text,
            1 / outcome.times(ours, DIRECT),
            0.7,
            partial(profiles.why_not_as_fast, traces[ours]),
            form=".0%",
        )
        for ours, text in titles.items()
    ]
    if TRANSFORMERS in outcome.costs:
        wall, cpu = outcome.times(TRANSFORMERS, HF), outcome.times_cpu(TRANSFORMERS, HF)
        most = outcome.times(TRANSFORMERS, DIRECT)
        why = partial(profiles.why_not_times, traces[HF], most)
        allowed = outcome.costs[TRANSFORMERS].cpu / 10
        why_cpu = partial(profiles.why_cpu, traces[HF], allowed)
        found += [
            Aim("times transformers", wall, 15, why, form=".1f"),
            Aim("times less CPU", cpu, 10, why_cpu, form=".1f"),
        ]
    return found


def section(
    folder: Path, plots: Path, repeats: int = 3, *, peer: bool = True, size: Size | None = None
) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    given = ways(peer=peer)
    held = source(folder, "gpt-oss", size)
    outcome = contest.compete(folder, held, given, repeats)
    traces = profiles.profiles(folder, held, OPTIONS, repeats)
    chosen = size or KINDS["gpt-oss"].size
    return [
        "## The main job: gpt-oss MXFP4 to BF16",
        "",
        f"{chosen.layers} layers, {chosen.experts} experts, hidden {chosen.hidden}, intermediate "
        f"{chosen.intermediate}:",
        f"{outcome.source_nbytes / 1e9:.2f} GB in, {outcome.output_nbytes / 1e9:.2f} GB out.",
        *contest.terms(given, repeats),
        "",
        *contest.table(outcome),
        "",
        *contest.plot(plots / "main.svg", outcome, "gpt-oss MXFP4 to BF16, seconds"),
        "",
        *aims.table(aimed(outcome, traces)),
        "",
        *profiles.section(plots, traces, repeats),
        "",
        *contest.commands(given),
        "- all of it: `python -m bench --only main`",
    ]
