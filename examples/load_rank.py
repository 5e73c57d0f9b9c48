"""Write two ranks of a model and load one of them, zero-copy: load_rank.py [DIR]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import moeconv
from moeconv.demo import make_checkpoint
from moeconv.load import expert_map


def main(folder: Path) -> None:
    """Make a checkpoint, place its experts on two ranks, load the second rank."""
    src, dst = folder / "checkpoint", folder / "ranks"
    make_checkpoint(src)
    moeconv.convert(moeconv.plan(src, dst, layout="vllm", tp=2, ep=True), dst)
    tensors = moeconv.load(dst, rank=1)
    name = "model.layers.0.mlp.experts.routed_experts.w13_weight"
    weight = tensors[name]
    print(f"{len(tensors)} tensors; {name}: {weight.dtype} {list(weight.shape)}")
    print(f"its slots hold the experts {list(expert_map(dst, 1))}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
