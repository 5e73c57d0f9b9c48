"""moeconv demo: the main job on a small checkpoint, offline, every command shown."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moeconv.cli.tables import Printer
from moeconv.errors import Refused
from moeconv.types import Json

CHECKPOINT, HF, VLLM = "checkpoint", "hf", "vllm-tp2"


def demo_command(values: Mapping[str, Json]) -> int:
    """Make a small MXFP4 checkpoint of random numbers, convert it, verify and load the outputs.

    Works offline and takes seconds. Without DIR a temporary directory is used and removed.
    """
    if "dir" in values:
        directory = Path(values["dir"])
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise Refused(
                "DIR is not empty", where=str(directory), hint="give a new or an empty directory"
            )
        return _run(directory, Printer(values))
    with tempfile.TemporaryDirectory(prefix="moeconv-demo-") as made:
        printer = Printer(values)
        code = _run(Path(made), printer)
        printer.line()
        printer.line(f"{made} is removed now; moeconv demo DIR keeps what it makes")
        return code


def command_lines(directory: Path) -> list[list[str]]:
    """Return the commands of the demo, as a user would type them after `moeconv`."""
    src, hf, vllm = (str(directory / name) for name in (CHECKPOINT, HF, VLLM))
    return [
        ["inspect", src],
        ["plan", src, vllm, "--layout", "vllm", "--tp", "2"],
        ["convert", src, hf],
        ["convert", src, vllm, "--layout", "vllm", "--tp", "2"],
        ["inspect", vllm],
        ["verify", vllm, "--source", src],
    ]


def _run(directory: Path, printer: Printer) -> int:
    from moeconv.cli import run_line
    from moeconv.demo import make_checkpoint
    from moeconv.store.space import human

    nbytes = make_checkpoint(directory / CHECKPOINT)
    printer.line(
        f"made {directory / CHECKPOINT}: {human(nbytes)} of random numbers in gpt-oss's form"
    )
    lines = command_lines(directory)
    quiet = ["-q"] if printer.silent else []
    for line in lines:
        printer.line()
        printer.line(f"$ moeconv {shlex.join(line)}", style="bold")
        code = run_line([*line, *quiet])
        if code:
            return code
    _load(directory, printer)
    printer.json(
        {
            "directory": str(directory),
            "checkpoint_nbytes": nbytes,
            "commands": [f"moeconv {shlex.join(line)}" for line in lines],
        }
    )
    return 0


def _load(directory: Path, printer: Printer) -> None:
    """Load rank 0 as a program would, and say what came."""
    if printer.silent:
        return
    import moeconv

    printer.line()
    printer.line(f">>> tensors = moeconv.load({str(directory / VLLM)!r}, rank=0)", style="bold")
    tensors = moeconv.load(directory / VLLM, rank=0)
    name = next(name for name in tensors if name.endswith("w13_weight"))
    found = tensors[name]
    printer.line(f"{len(tensors)} tensors; {name}: {found.dtype}, {list(found.shape)}")
