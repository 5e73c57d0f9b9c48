"""Every source tensor ends in exactly one state; every output element has exactly one owner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moeconv.api as api
from moeconv.accounting import STATES, check_drafts
from moeconv.errors import UnrecognizedTensor
from moeconv.layouts.base import Draft, Fill
from moeconv.types import Span
from tests.checkpoints import Size, load_file, quick_directory, save, write_checkpoint

CASES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    # A layer of gpt-oss: 2 blocks, 2 scales, 2 biases, 13 others; of Mixtral: 12 experts, 7 others.
    ("gptoss-mxfp4", {}, {"decoded": 4, "codec part": 4, "copied": 33}),
    ("gptoss-mxfp4", {"layout": "vllm", "tp": 2}, {"decoded": 4, "codec part": 4, "copied": 33}),
    ("gptoss-mxfp4", {"dense_dtype": "fp16"}, {"decoded": 33, "codec part": 4, "copied": 4}),
    ("gptoss-bf16", {"dtype": "fp32"}, {"decoded": 37}),
    ("mixtral", {}, {"copied": 41}),
    ("mixtral", {"experts_only": True}, {"copied": 24, "not selected": 17}),
    ("mixtral", {"layout": "vllm", "layers": (1,)}, {"copied": 19, "not selected": 22}),
]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory in memory: these tests make many outputs, and no disk matters to them."""
    with quick_directory() as directory:
        yield directory


@pytest.mark.parametrize(("kind", "options", "expected"), CASES)
def test_states(
    kind: str, options: dict[str, Any], expected: dict[str, int], tmp_path: Path
) -> None:
    root = write_checkpoint(tmp_path / "src", kind, Size(layers=2)).root
    stored = load_file(root / "model.safetensors")
    accounting = api.plan(root, **options).accounting
    names = [state.ref.name for state in accounting.states]
    assert sorted(names) == sorted(stored)
    totals = accounting.totals()
    assert set(totals) == set(STATES)
    assert {name: count for name, (count, _) in totals.items() if count} == expected
    assert sum(nbytes for _, nbytes in totals.values()) == sum(t.nbytes for t in stored.values())


def test_a_tensor_that_vllm_has_no_row_for_is_an_error(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "src", "mixtral")
    name = "model.layers.0.self_attn.extra.weight"
    tensors = load_file(checkpoint.root / "model.safetensors")
    tensors[name] = tensors["model.norm.weight"].clone()
    config = api.plan(checkpoint.root).model.source.config
    save(checkpoint.root, dict(config), tensors)
    with pytest.raises(UnrecognizedTensor, match=name.replace(".", r"\.")):
        api.plan(checkpoint.root, layout="vllm")
    assert api.plan(checkpoint.root).accounting.output_tensors == len(tensors)  # hf keeps it
    assert api.plan(checkpoint.root, layout="vllm", experts_only=True).files


def fill(row: int, rows: int, col: int = 0, cols: int = 4, step: int = 1) -> Fill:
    return Fill("main", 0, "x", None, Span(0, rows), Span(0, cols), row, step, col, rows, cols)


def draft(*fills: Fill, name: str = "t") -> Draft:
    return Draft(name, "BF16", (4, 4), 1, 4, 4, fills)


RIGHT = [
    (fill(0, 4),),
    (fill(0, 2), fill(2, 2)),
    (fill(0, 4, 0, 1), fill(0, 4, 1, 3)),
    (fill(0, 2, step=2), fill(1, 2, step=2)),
]
WRONG = [
    (),
    (fill(0, 3),),
    (fill(0, 4), fill(0, 4)),
    (fill(0, 3), fill(2, 2)),
    (fill(0, 2), fill(1, 2)),
    (fill(0, 4, 0, 2), fill(0, 4, 1, 2)),
    (fill(0, 2, step=2), fill(0, 2, step=2)),
    (fill(0, 2, step=2), fill(0, 2)),
]


@pytest.mark.parametrize("fills", RIGHT)
def test_fills_that_own_each_element_once(fills: tuple[Fill, ...]) -> None:
    check_drafts([draft(*fills)])


@pytest.mark.parametrize("fills", WRONG)
def test_fills_that_do_not(fills: tuple[Fill, ...]) -> None:
    with pytest.raises(AssertionError, match="own each element once"):
        check_drafts([draft(*fills)])


def test_one_name_twice_on_a_rank() -> None:
    with pytest.raises(AssertionError, match="written twice"):
        check_drafts([draft(fill(0, 4)), draft(fill(0, 4))])
    check_drafts([draft(fill(0, 4)), draft(fill(0, 4))._replace(rank=1)])
