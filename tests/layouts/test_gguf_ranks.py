"""A GGUF source gives the ranks that its own Hugging Face form gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeconv import api
from moeconv.errors import Refused
from tests.checkpoints import quick_directory
from tests.conftest import FIXTURES

SOURCES = sorted(path for path in (FIXTURES / "checkpoints").glob("gguf-*"))
SPLITS: tuple[dict[str, Any], ...] = (
    {"layout": "vllm", "tp": 2},
    {"layout": "vllm", "tp": 2, "experts_only": True},
    {"layout": "vllm", "tp": 2, "ep": True, "experts_only": True},
    {"layout": "ktransformers", "dtype": "bf16", "numa": 1},
)


def data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("options", SPLITS, ids=lambda one: "-".join(map(str, one.values())))
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_ranks_are_those_of_the_hugging_face_form(source: Path, options: dict[str, Any]) -> None:
    with quick_directory() as directory:
        api.convert(api.plan(source), directory / "hf")
        try:
            plan = api.plan(directory / "hf", **options)
        except Refused as refused:
            with pytest.raises(type(refused)):
                api.plan(source, **options)
            return
        api.convert(plan, directory / "from-hf")
        api.convert(api.plan(source, **options), directory / "from-gguf")
        assert data(directory / "from-gguf") == data(directory / "from-hf")
        assert data(directory / "from-hf")
