"""BF16 to kt-kernel's packed forms: its own converter and its packing call beside ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench import aims, contest, profiles
from bench.aims import Aim
from bench.architectures import Size
from bench.checkpoints import source
from bench.contest import DIRECT, Outcome, Turn, Way
from bench.measure import DURABLE, Cost, convert, run_telling
from bench.profiles import Trace

KT_PYTHON = "MOECONV_KT_PYTHON"
DTYPES = ("int4", "int8")
THREADS = 2
# kt-kernel's wheel has no converter; its repository's scripts/convert_cpu_weights.py refuses to
# run without an accelerator. What that does to BF16 experts on the way, layer by layer: read and
# stack gate, up and down; let KTMoEWrapper.load_weights_from_tensors pack them into one file per
# matrix and scale; read these files back, remove them, and save everything with safetensors. The
# copy of the other tensors is left out: ours does not write them either.
START = """
import glob, json, pathlib, shutil, sys, time
import numpy, torch
def unpinned(make):
    return lambda *given, pin_memory=False, **options: make(*given, **options)
for name in ("empty", "zeros", "full"):  # builds without a GPU refuse pin_memory
    setattr(torch, name, unpinned(getattr(torch, name)))
import kt_kernel
from safetensors import safe_open
from safetensors.torch import save_file
source, out, dtype, threads = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
pathlib.Path(out).mkdir(parents=True)
config = json.loads((source / "config.json").read_text())
experts, hidden, inner = (
    config[name] for name in ("num_experts", "hidden_size", "moe_intermediate_size")
)
files = [safe_open(path, "pt") for path in sorted(source.glob("*.safetensors"))]
holder = {name: file for file in files for name in file.keys()}
def stacked(layer, name):
    names = [f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight" for e in range(experts)]
    return torch.stack([holder[name].get_tensor(name) for name in names]).contiguous()
def wrapper(layer):
    return kt_kernel.KTMoEWrapper(
        layer_idx=layer, num_experts=experts, num_experts_per_tok=2, hidden_size=hidden,
        moe_intermediate_size=inner, gpu_experts_mask=torch.zeros(experts, dtype=torch.bool),
        cpuinfer_threads=threads, threadpool_count=1, weight_path=out, chunked_prefill_size=512,
        cpu_save=True, method=f"AMX{dtype.upper()}", numa_nodes=[0],
    )
order = torch.arange(experts, dtype=torch.int64)
"""
CONVERT = """
saved = {}
for layer in range(config["num_hidden_layers"]):
    parts = [stacked(layer, name) for name in ("gate", "up", "down")]
    wrapper(layer).load_weights_from_tensors(*parts, order)
    del parts
    folder = f"{out}/_layer_{layer}"
    for name in ("gate", "up", "down"):
        for expert in range(experts):
            for kind, key, type in (("quant", "weight", "int8"), ("scale", "scale", "float32")):
                base = f"{folder}/_numa_0/{dtype.upper()}_{name}_{expert}_*Byte_{kind}_.kt"
                (path,) = glob.glob(base)
                data = numpy.frombuffer(open(path, "rb").read(), type).copy()
                saved[f"blk.{layer}.ffn_{name}_exps.{expert}.numa.0.{key}"] = torch.from_numpy(data)
    shutil.rmtree(folder)
save_file(saved, f"{out}/model.safetensors")
"""
# The packing call alone, as the wrapper makes it, without files; the second call is timed.
PACK = """
from kt_kernel.utils import amx
parts = [stacked(0, name) for name in ("gate", "up", "down")]
held = wrapper(0)
kinds = {"int4": amx.AMXInt4_MOE, "int8": amx.AMXInt8_MOE}
for _ in range(2):
    told = amx.MOEConfig(experts, 2, hidden, inner, held.gpu_experts_mask.data_ptr())
    told.layer_idx, told.pool, told.max_len = 0, held.cpu_infer.backend_, 512
    told.save, told.load = False, False
    told.gate_proj, told.up_proj, told.down_proj = (part.data_ptr() for part in parts)
    packed = kinds[dtype](told)
    start = time.monotonic()
    held.cpu_infer.submit(packed.load_weights_task(order.data_ptr()))
    held.cpu_infer.sync()
    figures["seconds"] = time.monotonic() - start
figures["nbytes"] = sum(part.nbytes for part in parts)
"""


def python() -> str | None:
    """Return the Python that has kt-kernel, or None."""
    return os.environ.get(KT_PYTHON)


def ours(dtype: str) -> str:
    """Return the title of our way."""
    return f"moeconv, {dtype}"


def theirs(dtype: str) -> str:
    """Return the title of kt-kernel's way."""
    return f"kt-kernel's converter, {dtype}"


def converted(dtype: str, interpreter: str) -> Callable[[Turn], Cost]:
    """Return the run of kt-kernel's way; it reads through memory maps."""

    def run(turn: Turn) -> Cost:
        arguments = [str(turn.source), str(turn.target), dtype, str(THREADS)]
        told = run_telling(START + CONVERT + DURABLE, arguments, interpreter)
        return told.cost._replace(read_chars=0)

    return run


def packing_rate(root: Path, folder: Path, dtype: str, interpreter: str) -> float:
    """Return the GB/s of BF16 that kt-kernel's packing call takes, on THREADS threads."""
    target = folder / "kt-packed"
    arguments = [str(root), str(target), dtype, str(THREADS)]
    figures = run_telling(START + PACK, arguments, interpreter).figures
    target.rmdir()
    return figures["nbytes"] / figures["seconds"] / 1e9


def options_of(dtype: str) -> tuple[str, ...]:
    """Return the options of convert."""
    return ("--layout", "ktransformers", "--numa", "1", "--dtype", dtype)


def ways(dtype: str) -> list[Way]:
    """Return who takes part."""
    options = options_of(dtype)
    found = [
        Way(
            ours(dtype),
            lambda turn: convert(turn.source, turn.target, *options),
            f"`moeconv convert qwen3-moe OUT {' '.join(options)}`",
        ),
        contest.direct(),
    ]
    interpreter = python()
    if interpreter:
        call = "in bench/kt_job.py, with kt-kernel's `load_weights_from_tensors`; fsync"
        found.append(Way(theirs(dtype), converted(dtype, interpreter), call))
    return found


def aimed(outcomes: Mapping[str, Outcome], traces: Mapping[str, Trace]) -> list[Aim]:
    """Return the aims of this job; `traces`: of our ways."""
    found = []
    for dtype, outcome in outcomes.items():
        if theirs(dtype) in outcome.costs:
            wall = outcome.times(theirs(dtype), ours(dtype))
            cpu = outcome.times_cpu(theirs(dtype), ours(dtype))
            watched, most = traces[ours(dtype)], outcome.times(theirs(dtype), DIRECT)
            times = partial(profiles.why_not_times, watched, most)
            less = partial(profiles.why_cpu, watched, outcome.costs[theirs(dtype)].cpu / 10)
            found += [
                Aim(f"times kt-kernel's converter, {dtype}", wall, 4, times, form=".1f"),
                Aim(f"times less CPU, {dtype}", cpu, 10, less, form=".1f"),
            ]
    return found


def section(folder: Path, plots: Path, repeats: int = 3, size: Size | None = None) -> list[str]:
    """Return the part of docs/benchmarks.md."""
    given = source(folder, "qwen3-moe", size)
    outcomes = {dtype: contest.compete(folder, given, ways(dtype), repeats) for dtype in DTYPES}
    options = {ours(dtype): options_of(dtype) for dtype in DTYPES}
    traces = profiles.profiles(folder, given, options, repeats)
    lines = [
        "## BF16 to AMXINT4 and AMXINT8: beside kt-kernel",
        "",
        f"A Qwen3-MoE layer, {given.nbytes / 1e9:.2f} GB in; the experts alone are written,",
        f"kt-kernel with {THREADS} threads and one NUMA part. Its wheel has no converter and the",
        "one of its repository needs an accelerator: bench/kt_job.py does what that does, with",
        "kt-kernel's own packing.",
        *contest.terms(ways(DTYPES[0]), repeats),
    ]
    if not python():
        lines += ["", f"kt-kernel did not run: {KT_PYTHON} names no Python that has it."]
    for dtype, outcome in outcomes.items():
        lines += ["", *contest.table(outcome)]
        lines += ["", *contest.plot(plots / f"kt-{dtype}.svg", outcome, f"BF16 to AMX{dtype}, s")]
    if python():
        lines += ["", *aims.table(aimed(outcomes, traces))]
    lines += ["", *profiles.section(plots, traces, repeats)]
    told = [line for dtype in DTYPES for line in contest.commands(ways(dtype))]
    return [*lines, "", *told, "- all of it: `python -m bench --only ktransformers`"]
