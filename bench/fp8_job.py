"""FP8 blocks to BF16: compressed-tensors' converter and DeepSeek's own formula beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bench import aims, contest, profiles
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import source
from bench.contest import DIRECT, Outcome, Turn, Way
from bench.measure import DURABLE, Cost, convert, run_python
from bench.profiles import Trace

OURS = "moeconv"
WORKERS = (1, 2)
DEEPSEEK = "DeepSeek's fp8_cast_bf16, its formula in torch"
COMPRESSED_TENSORS = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
convert_checkpoint(
    sys.argv[1],
    sys.argv[2],
    FP8BlockDequantizer.from_pretrained(sys.argv[1]),
    max_workers=int(sys.argv[3]),
)
"""
# What DeepSeek-V3's inference/fp8_cast_bf16.py does, file by file, without its GPU: weight_dequant
# is the float32 product of every block with its scale, stored as BF16.
CAST = """
import json, pathlib, sys, torch
from safetensors.torch import load_file, save_file
root, out = map(pathlib.Path, sys.argv[1:3])
out.mkdir()
index = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
loaded = {}
def tensor(name):
    file = index[name]
    if file not in loaded:
        loaded[file] = load_file(root / file)
    return loaded[file][name]
def dequantize(weight, scales):
    rows, cols = weight.shape
    whole = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return (weight.to(torch.float32) * whole).to(torch.bfloat16)
for file in sorted(set(index.values())):
    made = {}
    for name in [name for name, held in index.items() if held == file]:
        if name.endswith("_scale_inv"):
            continue
        weight = tensor(name)
        scaled = weight.element_size() == 1
        made[name] = dequantize(weight, tensor(name + "_scale_inv")) if scaled else weight
    save_file(made, out / file)
    while len(loaded) > 2:
        del loaded[next(iter(loaded))]
"""


def compressed_tensors(workers: int) -> Way:
    """Return its converter with so many workers; it reads through memory maps."""

    def run(turn: Turn) -> Cost:
        arguments = [str(turn.source), str(turn.target), str(workers)]
        return run_python(COMPRESSED_TENSORS + DURABLE, arguments)._replace(read_chars=0)

    call = f"`convert_checkpoint(SRC, OUT, FP8BlockDequantizer(...), max_workers={workers})`, fsync"
    return Way(f"compressed-tensors, max_workers={workers}", run, call)


def cast(turn: Turn) -> Cost:
    """Measure DeepSeek's way."""
    return run_python(CAST + DURABLE, [str(turn.source), str(turn.target)])._replace(read_chars=0)


def ways() -> list[Way]:
    """Return who takes part."""
    return [
        Way(
            OURS,
            lambda turn: convert(turn.source, turn.target),
            "`moeconv convert deepseek-v3 OUT`",
        ),
        contest.direct(),
        *map(compressed_tensors, WORKERS),
        contest.copied(),
        Way(DEEPSEEK, cast, "in bench/fp8_job.py; the script itself needs a GPU", once=True),
    ]


def aimed(outcome: Outcome, traces: Mapping[str, Trace]) -> list[Aim]:
    """Return the aims of this job: against the better of the workers' numbers."""
    theirs = [outcome.costs[compressed_tensors(workers).title] for workers in WORKERS]
    wall, cpu = min(one.wall for one in theirs), min(one.cpu for one in theirs)
    ours, most = outcome.costs[OURS], wall / outcome.costs[DIRECT].wall
    watched = traces[OURS]
    slow = partial(profiles.why_not_as_fast, watched)
    times = partial(profiles.why_not_times, watched, most)
    less = partial(profiles.why_cpu, watched, cpu / 10)
    share = 1 / outcome.times(OURS, DIRECT)
    return [
        Aim("speed against the O_DIRECT write", share, 0.7, slow, form=".0%"),
        Aim("times compressed-tensors", wall / ours.wall, 4, times, form=".1f"),
        Aim("times less CPU", cpu / ours.cpu, 10, less, form=".1f"),
    ]


def section(folder: Path, plots: Path, repeats: int = 3, size: Size | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    given = ways()
    held = source(folder, "deepseek-v3", size)
    outcome = contest.compete(folder, held, given, repeats)
    traces = profiles.profiles(folder, held, {OURS: ()}, repeats)
    return [
        "## FP8 to BF16: beside compressed-tensors and DeepSeek",
        "",
        "A layer as DeepSeek-V3 has them, with 24 experts, scales per 128 x 128 block, four files:",
        f"{outcome.source_nbytes / 1e9:.2f} GB in, {outcome.output_nbytes / 1e9:.2f} GB out.",
        "On a CPU compressed-tensors works through the files one by one, whatever its workers.",
        *contest.terms(given, repeats),
        "",
        *contest.table(outcome),
        "",
        *contest.plot(plots / "fp8.svg", outcome, "FP8 blocks to BF16, seconds"),
        "",
        *aims.table(aimed(outcome, traces)),
        "",
        *profiles.section(plots, traces, repeats),
        "",
        *contest.commands(given),
        "- all of it: `python -m bench --only fp8`",
    ]
