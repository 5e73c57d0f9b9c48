"""Loads one layer with kt-kernel's own loader and runs its engine; knows nothing of moeconv.

    python kt_client.py DIRECTORY METHOD PARTS IN.safetensors OUT.safetensors

IN: x [tokens, hidden] BF16, ids [tokens, k] int64, weights [tokens, k] float32, and sizes
[experts, intermediate, layer]. OUT: y [tokens, hidden] BF16. One process per directory: kt-kernel
keeps its loader. All NUMA parts run on node 0, so that any machine will do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a torch function without its pin_memory, which builds without a GPU refuse."""

    def call(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*arguments, **options)

    return call


def main(directory: str, method: str, parts: int, source: str, target: str) -> None:
    for name in ("empty", "zeros", "full"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    import kt_kernel

    given = load_file(source)
    x, ids, weights = given["x"], given["ids"], given["weights"]
    experts, intermediate, layer = given["sizes"].tolist()
    wrapper = kt_kernel.KTMoEWrapper(
        layer_idx=layer,
        num_experts=experts,
        num_experts_per_tok=ids.shape[1],
        hidden_size=x.shape[1],
        moe_intermediate_size=intermediate,
        gpu_experts_mask=None,
        cpuinfer_threads=parts,
        threadpool_count=parts,
        weight_path=directory,
        chunked_prefill_size=max(len(x), 32),
        method=method,
        numa_nodes=[0] * parts,
    )
    wrapper.load_weights(torch.arange(experts, dtype=torch.int64))
    y = torch.zeros(x.shape, dtype=torch.bfloat16)
    count = torch.tensor([len(x)], dtype=torch.int32)
    task = wrapper.moe.forward_task(
        count.data_ptr(),
        ids.shape[1],
        ids.data_ptr(),
        weights.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        False,
    )
    wrapper.cpu_infer.submit(task)
    wrapper.cpu_infer.sync()
    save_file({"y": y}, target, {"variant": kt_kernel.__cpu_variant__})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
