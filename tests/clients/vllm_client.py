"""Generates with vLLM from a directory and writes what it computed; knows nothing of moeconv.

    python vllm_client.py DIRECTORY LOAD_FORMAT RANKS OUT.json

OUT: `version`, `tokens` (greedy) and `logprobs`, the whole vocabulary's at every step. Token ids go
in and out: no tokenizer is needed. One process per directory.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# A small cache, one thread a rank, no compilation, no binding to cores: tiny models, any machine.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPT = [2, 61, 180, 14, 9, 233]
STEPS = 8


def main(directory: str, load_format: str, ranks: int, target: str) -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import vllm

    model = vllm.LLM(
        directory,
        load_format=load_format,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=32,
        max_num_seqs=1,
        max_logprobs=-1,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False, logprobs=-1
    )
    answer = model.generate([{"prompt_token_ids": PROMPT}], sampling)[0].outputs[0]
    steps = [{token: one.logprob for token, one in step.items()} for step in answer.logprobs]
    found = {
        "version": vllm.__version__,
        "tokens": list(answer.token_ids),
        "logprobs": [[step[token] for token in sorted(step)] for step in steps],
    }
    Path(target).write_text(json.dumps(found))
    model.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # the workers of several ranks may keep the interpreter for half a minute


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
