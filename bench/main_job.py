"""The main job: gpt-oss MXFP4 to hf and to eight ranks, beside what the disk can do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.checkpoints import SIZES, Size, source
from bench.measure import Cost, convert, copy_plainly, fresh, middle, run_python, write_direct

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
)
model.save_pretrained(sys.argv[2])
import os
os.sync()
"""


class MainJob(NamedTuple):
    """Medians of one interleaved run; seconds, bytes."""

    source_nbytes: int
    output_nbytes: int
    hf: Cost
    tp8: Cost
    direct_seconds: float
    copy_seconds: float
    transformers: Cost | None


def run_main_job(
    folder: Path, repeats: int = 3, *, peer: bool = True, size: Size | None = None
) -> MainJob:
    """Run everything `repeats` times in turn (transformers once) and return the medians."""
    root, source_nbytes = source(folder, "gpt-oss", size)
    hf, tp8, copied = folder / "hf", folder / "tp8", folder / "copied"
    costs: dict[str, list[Cost]] = {"hf": [], "tp8": []}
    seconds: dict[str, list[float]] = {"direct": [], "copy": []}
    nbytes = 0
    for _ in range(repeats + 1):  # the first warms caches and is not counted
        costs["hf"].append(fresh(hf, lambda: convert(root, hf)))
        nbytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
        seconds["direct"].append(write_direct(folder / "direct", nbytes))
        costs["tp8"].append(fresh(tp8, lambda: convert(root, tp8, "--layout", "vllm", "--tp", "8")))
        seconds["copy"].append(fresh(copied, lambda: copy_plainly(hf, copied)))
        for leftover in (tp8, copied):
            shutil.rmtree(leftover)
        (folder / "direct").unlink()
    shutil.rmtree(hf)
    saved = folder / "transformers"
    other = fresh(saved, lambda: run_python(PEER, [str(root), str(saved)])) if peer else None
    shutil.rmtree(saved, ignore_errors=True)
    return MainJob(
        source_nbytes,
        nbytes,
        middle(costs["hf"][1:]),
        middle(costs["tp8"][1:]),
        median(seconds["direct"][1:]),
        median(seconds["copy"][1:]),
        other,
    )


def table(job: MainJob) -> Sequence[str]:
    """Return the Markdown rows of the result."""
    gb = job.output_nbytes / 1e9

    def row(name: str, seconds: float, cost: Cost | None) -> str:
        cpu = f"{cost.cpu:.1f}" if cost else ""
        rss = f"{cost.peak_rss / 2**30:.2f}" if cost else ""
        read = f"{cost.read_chars / job.source_nbytes:.3f}" if cost and cost.read_chars else ""
        share = f"{job.direct_seconds / seconds:.0%}"
        return f"| {name} | {seconds:.2f} | {gb / seconds:.2f} | {share} | {cpu} | {rss} | {read} |"

    rows = [
        "| | seconds | GB/s of output | speed against the O_DIRECT write | CPU seconds "
        "| peak RSS, GiB | bytes read / source |",
        "|---|---|---|---|---|---|---|",
        row("O_DIRECT write of as many bytes, 2 threads", job.direct_seconds, None),
        row("`cp` of the output, synced", job.copy_seconds, None),
        row("moeconv, `--layout hf`", job.hf.wall, job.hf),
        row("moeconv, `--layout vllm --tp 8`", job.tp8.wall, job.tp8),
    ]
    if job.transformers is not None:
        rows.append(
            row(
                "transformers: dequantize, save_pretrained", job.transformers.wall, job.transformers
            )
        )
    return rows


def section(
    folder: Path, repeats: int = 3, *, peer: bool = True, size: Size | None = None
) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    job = run_main_job(folder, repeats, peer=peer, size=size)
    chosen = size or SIZES["gpt-oss"]
    return [
        "## The main job: gpt-oss MXFP4 to BF16",
        "",
        f"{chosen.layers} layers, {chosen.experts} experts, hidden {chosen.hidden}, intermediate "
        f"{chosen.intermediate}:",
        f"{job.source_nbytes / 1e9:.2f} GB in, {job.output_nbytes / 1e9:.2f} GB out. Start-up, "
        "planning and making the output durable are",
        "included; the source is in the page cache, as it is after a download. Medians of",
        f"{repeats}, in turn, after one that is not counted; transformers once. Aims: 70 % of the",
        "speed of the O_DIRECT write, 15 times transformers.",
        "",
        *table(job),
        "",
        "Commands: `moeconv convert gpt-oss hf`;",
        "`moeconv convert gpt-oss tp8 --layout vllm --tp 8`; transformers:",
        "`from_pretrained(quantization_config=Mxfp4Config(dequantize=True),",
        "dtype=torch.bfloat16)`, `save_pretrained`, `os.sync()`. All of it:",
        "`python -m bench --only main`.",
    ]
