"""`python -m bench [FOLDER]`: run the benchmarks in FOLDER and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from bench import main_job, start_up

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def machine() -> str:
    """Return the machine in words: processor, cores, memory, Python."""
    info = Path("/proc/cpuinfo").read_text()
    model = next(line.split(": ")[1] for line in info.splitlines() if "model name" in line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, no GPU"
    )


def document(job: main_job.MainJob) -> str:
    """Return the text of docs/benchmarks.md."""
    source, output = job.source_nbytes / 1e9, job.output_nbytes / 1e9
    lines = [
        "# Benchmarks",
        "",
        "`make bench` runs everything here and writes this page. Figures are medians of runs that",
        "take turns on one machine; only ratios inside a table mean something elsewhere.",
        "",
        f"Machine: {machine()}. What ran on no GPU yet is not here.",
        "",
        "## The main job: gpt-oss MXFP4 to BF16",
        "",
        f"2 layers, 32 experts, hidden and intermediate 2880: {source:.2f} GB in, "
        f"{output:.2f} GB out. Start-up, planning and making the output durable are included; the",
        "source is in the page cache, as it is after a download. 3 runs each, transformers once.",
        "",
        *main_job.table(job),
        "",
        "Commands: `moeconv convert gpt-oss hf`, `moeconv convert gpt-oss tp8 --layout vllm --tp 8`;",
        "transformers: `from_pretrained(quantization_config=Mxfp4Config(dequantize=True),",
        "dtype=torch.bfloat16)`, `save_pretrained`, `os.sync()`.",
        "",
        "## Start-up",
        "",
        *start_up.table(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="bench-data", help="where the data are made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    job = main_job.run_main_job(Path(options.folder), options.repeats, peer=not options.no_peer)
    text = document(job)
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
