"""Time to first use of one rank: a written rank mapped or read, or cut from the whole model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.architectures import Size
from bench.checkpoints import source
from bench.measure import Told, convert, run_python, run_telling

KIND = "qwen3-moe"
RANKS = 8
REPEATS = 5
VLLM_PYTHON = "MOECONV_VLLM_PYTHON"
# What every way ends with. `tensors` are then in the process; the largest byte of each is looked
# for, so that every byte is read.
READ = """
for tensor in tensors:
    tensor.reshape(-1)[0].item()
figures["first"] = time.monotonic() - start
top = max(int(tensor.reshape(-1).view(torch.uint8).max()) for tensor in tensors)
figures["all"] = time.monotonic() - start
figures["nbytes"] = sum(tensor.nbytes for tensor in tensors)
status = open("/proc/self/status").read()
figures["own"] = int(status.split("RssAnon:")[1].split()[0]) * 1024
"""
# torch starts its threads on its first large work.
WARM = "torch.zeros(1 << 22, dtype=torch.uint8).max()\n"
START = "start = time.monotonic()\n"
CUT = """
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLS = ("o_proj", "down_proj")
def cut(file, name, ranks):
    part = file.get_slice(name)
    shape, module = part.get_shape(), name.split(".")[-2]
    if module in ROWS:
        return part[: shape[0] // ranks]
    if module in COLS:
        return part[:, : shape[1] // ranks].contiguous()
    return part[:]
"""


class Way(NamedTuple):
    """One way to the tensors of rank 0: `given` names the file that its code gets."""

    title: str
    given: str
    code: str


WAYS: Mapping[str, Way] = {
    "moeconv": Way(
        "`moeconv.load(OUT, rank=0)`",
        "output",
        "import moeconv, moeconv.load, moeconv.torch_dtypes\n"
        + START
        + "tensors = list(moeconv.load(sys.argv[1], rank=0).values())\n",
    ),
    "safetensors": Way(
        "`safetensors.torch.load_file` of the rank's file",
        "file",
        "from safetensors.torch import load_file\n"
        + START
        + "tensors = list(load_file(sys.argv[1]).values())\n",
    ),
    "torch": Way(
        "`torch.load` of the same tensors, saved by `torch.save`",
        "saved",
        START + "tensors = list(torch.load(sys.argv[1]).values())\n",
    ),
    "cut": Way(
        "rank 0 of 8 cut from the whole model by safetensors' `get_slice`",
        "source",
        "from safetensors import safe_open\n"
        + CUT
        + START
        + f"with safe_open(sys.argv[1], 'pt') as file:\n"
        f"    tensors = [cut(file, name, {RANKS}) for name in file.keys()]\n",
    ),
}
VLLM_WAY = (
    "from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator\n"
    + START
    + "found = safetensors_weights_iterator([sys.argv[1]], use_tqdm_on_load=False)\n"
    "tensors = [tensor for _, tensor in found]\n"
)
VLLM_WAYS: Mapping[str, Way] = {
    "vllm-rank": Way("vLLM's `safetensors_weights_iterator`, the rank's file", "file", VLLM_WAY),
    "vllm-whole": Way("the same, the whole model", "source", VLLM_WAY),
}
SAVE = """
import torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""


class Row(NamedTuple):
    """Medians of one way: seconds from the call, bytes."""

    title: str
    first: float
    everything: float
    nbytes: float
    peak_rss: float
    own: float


def measure(way: Way, given: Mapping[str, Path], python: str | None) -> Told:
    """Load once, in a process of its own, imports not counted."""
    code = "import time, torch\n" + WARM + way.code + READ
    arguments = [str(given[way.given])]
    return run_telling(code, arguments, python) if python else run_telling(code, arguments)


def prepare(folder: Path, size: Size | None) -> dict[str, Path]:
    """Return what the ways read, each already in the page cache."""
    root, _ = source(folder, KIND, size)
    output, saved = folder / "loading", folder / "loading.pt"
    shutil.rmtree(output, ignore_errors=True)
    convert(root, output, "--layout", "vllm", "--tp", str(RANKS))
    [file] = output.glob("model-rank-0-*.safetensors")
    run_python(SAVE, [str(file), str(saved)])
    [whole] = root.glob("*.safetensors")
    return {"output": output, "file": file, "saved": saved, "source": whole}


def run(folder: Path, repeats: int = REPEATS, size: Size | None = None) -> list[Row]:
    """Load by every way `repeats` times in turn, after once that warms the page cache."""
    given = prepare(folder, size)
    python = os.environ.get(VLLM_PYTHON)
    ways = {**WAYS, **(VLLM_WAYS if python else {})}
    told: dict[str, list[Told]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            told[name].append(measure(way, given, python if name in VLLM_WAYS else None))
    shutil.rmtree(given["output"])
    given["saved"].unlink()
    return [_row(ways[name].title, found[1:]) for name, found in told.items()]


def _row(title: str, found: Sequence[Told]) -> Row:
    def middle(key: str) -> float:
        return median(one.figures[key] for one in found)

    peak = median(one.cost.peak_rss for one in found)
    return Row(title, middle("first"), middle("all"), middle("nbytes"), peak, middle("own"))


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown rows; the first is what the others are compared with."""
    lines = [
        "| | MB | first element of every tensor, ms | against moeconv | every byte, ms "
        "| against moeconv | peak RSS, GiB | of it no file's pages, at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.title} | {row.nbytes / 1e6:.0f} "
            f"| {row.first * 1e3:.1f} | {row.first / rows[0].first:.1f} "
            f"| {row.everything * 1e3:.1f} | {row.everything / rows[0].everything:.1f} "
            f"| {row.peak_rss / 2**30:.2f} | {row.own / 2**30:.2f} |"
        )
    return lines


def section(folder: Path, repeats: int = REPEATS, size: Size | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    lines = [
        "## Loading: one rank of eight",
        "",
        "Qwen3-MoE BF16, `--layout vllm --tp 8`, rank 0, on the CPU: milliseconds from the call,",
        "imports not counted, to the first element of every tensor and then to every byte of them.",
        "The last line of the first four is what an engine does without written ranks: it cuts",
        "each of its tensors from the whole model, rows or columns by rule, a copy each; fusing",
        "and stacking, which engines also do then, is left out. moeconv checks the manifest and",
        "the files' sizes first. Reading every byte is as much for all; what comes before it",
        f"differs. Medians of {repeats}, in turn, in processes of their own, files in the page",
        "cache. Mapped pages count as RSS and can be dropped; the last column cannot.",
        "",
        *table(run(folder, repeats, size)),
        "",
    ]
    if VLLM_PYTHON not in os.environ:
        lines += [f"vLLM's own reader is not in this run: it needs `{VLLM_PYTHON}`.", ""]
    return [*lines, "All of it: `python -m bench --only loading`."]
