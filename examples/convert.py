"""Inspect, plan and convert a checkpoint from Python: convert.py [SRC DST]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import moeconv
from moeconv.demo import make_checkpoint


def main(src: Path, dst: Path) -> None:
    """Convert SRC to a dense Hugging Face directory and say what was done."""
    model = moeconv.inspect(src)
    print(
        f"{model.family.name}: {len(model.weights)} weights, experts of {len(model.expert_layers)}"
        " layers"
    )
    plan = moeconv.plan(src, dst, layout="hf", dtype="bf16")
    print(f"{len(plan.files)} files, {plan.nbytes:,} bytes, plan {plan.digest}")
    result = moeconv.convert(plan)
    print(f"{result.state}: {result.nbytes:,} bytes written, experts {result.manifest['experts']}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder) / "checkpoint")
            main(Path(folder) / "checkpoint", Path(folder) / "hf")
