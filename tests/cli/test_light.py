"""What starts quickly stays so: heavy packages are imported by the commands that need them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runs import run_python

HEAVY = ("torch", "numba", "transformers", "compressed_tensors", "gguf", "rich")
SCRIPT = """
import json, sys
sys.argv = ["moeconv", *json.loads(sys.argv[1])]
from moeconv.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
sys.stderr.write("\\n" + json.dumps([name for name in HEAVY if name in sys.modules]))
"""


def loaded(words: list[str]) -> set[str]:
    """Return which heavy packages a process holds after a command."""
    script = SCRIPT.replace("HEAVY", repr(HEAVY))
    ran = run_python(["-c", script, json.dumps(words)])
    assert ran.code == 0, ran.err
    return set(json.loads(ran.err.splitlines()[-1]))


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--version"], set()),
        (["--help"], {"rich"}),
        (["convert", "--help"], {"rich"}),
        (["formats"], {"rich"}),
        (["inspect", "SRC"], {"rich"}),
        (["inspect", "SRC", "--json"], set()),
        (["plan", "SRC", "DST", "--layout", "vllm", "--tp", "2"], {"rich"}),
    ],
)
def test_commands_import_what_they_need(
    words: list[str], allowed: set[str], checkpoint: Path, tmp_path: Path
) -> None:
    paths = {"SRC": str(checkpoint), "DST": str(tmp_path / "dst")}
    assert loaded([paths.get(word, word) for word in words]) <= allowed


def test_kernels_that_are_kept_need_no_numba(checkpoint: Path, tmp_path: Path) -> None:
    """The first of two conversions compiles what it finds no image of."""
    words = ["convert", str(checkpoint), str(tmp_path / "one"), "--progress", "none"]
    loaded(words)
    assert loaded([*words[:2], str(tmp_path / "two"), *words[3:]]) <= {"rich"}


def test_numpy_starts_no_threads_that_turn_in_circles() -> None:
    """OpenBLAS begins one per further core with numpy's import; each spins before it sleeps."""
    code = (
        "import os, sys\nfrom moeconv.cli import main\n"
        "assert 'numpy' not in sys.modules\n"
        "try:\n    main(['formats', '-q'])\nexcept SystemExit:\n    pass\n"
        "assert 'numpy' in sys.modules\nprint(len(os.listdir('/proc/self/task')))"
    )
    assert run_python(["-c", code]).out == "1\n"
