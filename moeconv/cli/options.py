"""Every option, one row each; the command line and its reference page are made from these rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moeconv.cli.parse import parse_numbers, parse_share, parse_size, read_expert_map
from moeconv.layouts.options import DTYPES
from moeconv.plan import LAYOUTS


class Row(NamedTuple):
    """One option or argument; `name` is that of the Python value and, with dashes, of the option.

    `kind`: flag, text, texts (may be given again), number, size, share, numbers, map or choice.
    """

    name: str
    kind: str
    help: str
    panel: str = "What to write"
    metavar: str = ""
    least: int = 1
    choices: tuple[str, ...] = ()
    short: str = ""
    argument: bool = False
    optional: bool = False  # of an argument

    @property
    def value_name(self) -> str:
        """Return what stands for the value in a description; "" for a flag or a choice."""
        return self.metavar or _METAVARS.get(self.kind, "")


LAYOUT_NAMES = tuple(layout.name for layout in LAYOUTS)
DTYPE_NAMES = tuple(dict.fromkeys(dtype for layout in LAYOUTS for dtype in layout.dtypes))
DENSE_NAMES = (*DTYPES, "keep")

_RANKS = "Ranks (vllm)"
_PART = "Part of the model"
_SOURCE = "Source"
RUNNING = "Running"
_REPORT = "Reporting"

SRC = Row(
    "src",
    "text",
    "A directory, a .safetensors file, a .safetensors.index.json or a .gguf file.",
    metavar="SRC",
    argument=True,
)
DST = Row("dst", "text", "The output directory.", metavar="DST", argument=True)
DEMO = Row(
    "dir",
    "text",
    "A new or empty directory to work in and to keep. (default: a temporary one)",
    metavar="[DIR]",
    argument=True,
    optional=True,
)

SHAPE: tuple[Row, ...] = (
    Row("layout", "choice", "What to write. (default: hf)", choices=LAYOUT_NAMES),
    Row(
        "dtype",
        "choice",
        "What the experts become; keep re-shards without decoding. (default: bf16)",
        choices=DTYPE_NAMES,
    ),
    Row(
        "dense_dtype",
        "choice",
        "What the other floating tensors become: quantized ones are decoded to it, 16-bit ones"
        " cast to it, F32 ones stay F32. (default: as --dtype)",
        choices=DENSE_NAMES,
    ),
    Row(
        "max_file_size",
        "size",
        "Of one output file. (default: 5GB (hf), one file per rank (vllm), per layer"
        " (ktransformers))",
    ),
    Row(
        "nonfinite",
        "choice",
        "NaN and Inf that appear where there were none (fp16 overflow): stop, or keep them. Those"
        " of the source are kept and counted. (default: error)",
        choices=("error", "keep"),
    ),
    Row("numa", "number", "NUMA parts (ktransformers). (default: 2)"),
    Row("tp", "number", "Tensor-parallel size; ranks = tp x dp. (default: 1)", _RANKS),
    Row("dp", "number", "Data-parallel size. (default: 1)", _RANKS),
    Row(
        "ep",
        "flag",
        "Place experts whole on the tp x dp ranks instead of splitting them over them.",
        _RANKS,
    ),
    Row(
        "placement",
        "choice",
        "Which expert goes to which rank with --ep. (default: linear)",
        _RANKS,
        choices=("linear", "round-robin"),
    ),
    Row(
        "redundant_experts",
        "number",
        "Experts held once more, with --ep. (default: 0)",
        _RANKS,
        least=0,
    ),
    Row(
        "expert_map",
        "map",
        "A JSON file with the experts of each rank, with --ep: [[0, 1], [2, 3]].",
        _RANKS,
        metavar="FILE",
    ),
    Row(
        "uneven",
        "choice",
        "A size that the ranks do not divide: refuse, or the next larger per rank with zeros at the"
        " end. (default: refuse; pad with --experts-only)",
        _RANKS,
        choices=("refuse", "pad"),
    ),
    Row(
        "pad_intermediate",
        "number",
        "Round the experts' intermediate size per rank up to a multiple of N, filled with zeros,"
        " gate and up each by itself. (default: off)",
        _RANKS,
    ),
    Row(
        "pad_hidden",
        "number",
        "Round the experts' hidden size up to a multiple of N, filled with zeros. (default: off)",
        _RANKS,
    ),
    Row(
        "vllm_names",
        "choice",
        "Names of the experts: below routed_experts, as vLLM 0.32 and later have them, or plain."
        " (default: routed)",
        _RANKS,
        choices=("routed", "plain"),
    ),
    Row(
        "ranks",
        "numbers",
        "Write only these ranks; runs with the others join the same DST, and the one that"
        " completes the set commits it. (default: all)",
        _PART,
        metavar="0,3-5",
    ),
    Row("layers", "numbers", "Only these layers. (default: all)", _PART, metavar="0-3,40"),
    Row("experts_only", "flag", "Only the experts.", _PART),
    Row("include", "texts", "Only output tensors whose name fits; may be repeated.", _PART, "GLOB"),
    Row("exclude", "texts", "No output tensor whose name fits; may be repeated.", _PART, "GLOB"),
)
CONFIG = Row("config", "text", "config.json for a source without one.", _SOURCE, "FILE")
ORIENTATION = Row(
    "orientation",
    "choice",
    "Which way packed experts lie where the headers leave it open.",
    _SOURCE,
    choices=("in-out", "out-in"),
)
_MEMORY = Row(
    "memory",
    "size",
    "Bound on bytes in flight. (default: 2GiB, less where the cgroup or free memory is)",
    RUNNING,
)
JOBS = Row("jobs", "number", "Tasks in flight. (default: from the number of cores)", RUNNING)
EFFORT = (_MEMORY._replace(help=_MEMORY.help.replace("2GiB", "1GiB")), JOBS)
DEVICE = Row(
    "device",
    "text",
    "Where weights are decoded: auto, cpu, cuda (all GPUs) or cuda:I. (default: auto)",
    RUNNING,
    metavar="DEVICE",
)
RESOURCES: tuple[Row, ...] = (
    DEVICE,
    Row("vram", "size", "Bound on each GPU's memory. (default: 4GiB, or half of it)", RUNNING),
    _MEMORY,
    JOBS,
    Row(
        "overwrite",
        "flag",
        "Replace a finished or unfinished output that moeconv wrote; anything else in DST is"
        " refused.",
        RUNNING,
    ),
)
PROGRESS = Row(
    "progress",
    "choice",
    "How progress is shown on stderr. (default: auto: a bar on a terminal, else lines)",
    _REPORT,
    choices=("auto", "bar", "plain", "none"),
)
VERIFY = Row(
    "verify",
    "choice",
    "After converting: nothing more (digests are taken while writing anyway), read again and"
    " compare, or also derive again from the source. (default: none)",
    RUNNING,
    choices=("none", "digest", "deep"),
)
CHECK: tuple[Row, ...] = (
    Row("source", "text", "Also compare with what this source gives.", _SOURCE, "SRC"),
    Row(
        "sample",
        "share",
        "How much of it is derived again: 5% or 0.05. (default: all)",
        _SOURCE,
        metavar="SHARE",
    ),
    CONFIG,
)
COMMON: tuple[Row, ...] = (
    Row("quiet", "flag", "Print errors only.", _REPORT, short="-q"),
    Row("verbose", "flag", "Print more; a traceback for a bug.", _REPORT, short="-v"),
    Row("json", "flag", "Print one JSON object on stdout and nothing else there.", _REPORT),
)

# Kind -> what reads its text; BadParameter says what is wrong with it.
PARSERS: Mapping[str, Callable[[str], Any]] = {
    "size": parse_size,
    "numbers": parse_numbers,
    "map": read_expert_map,
    "share": parse_share,
}
_METAVARS = {"size": "SIZE", "number": "N", "text": "TEXT"}


def flags_of(row: Row) -> tuple[str, ...]:
    """Return how an option is written: long, then short where it has a short form."""
    return (f"--{row.name.replace('_', '-')}", *((row.short,) if row.short else ()))


def shape_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that moeconv.Options takes."""
    names = [row.name for row in (*SHAPE, ORIENTATION)]
    given = {name: values[name] for name in names if name in values}
    for name in ("include", "exclude"):
        if name in given:
            given[name] = tuple(given[name])
    return given
