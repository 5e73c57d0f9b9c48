"""Nodes, masks and bound memory, as far as a machine of any number of nodes shows them."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest

from moeconv import numa
from moeconv.errors import Refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0\n", (0,)), ("0-2,5\n", (0, 1, 2, 5)), ("1,3-4", (1, 3, 4)), ("\n", ())],
)
def test_lists_of_nodes(text: str, expected: tuple[int, ...]) -> None:
    assert numa.parse_list(text) == expected


def test_nodes_without_memory_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", tmp_path)
    assert numa.memory_nodes() == (0,)
    (tmp_path / "online").write_text("0-3\n")
    assert numa.memory_nodes() == (0, 1, 2, 3)
    (tmp_path / "has_memory").write_text("0,2\n")
    assert numa.memory_nodes() == (0, 2)
    assert [numa.node_for(part) for part in range(4)] == [0, 2, 0, 2]


def test_bound_memory_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    node = numa.memory_nodes()[0]
    bound = numa.bound_memory(3 * mmap.PAGESIZE, node)
    bound.memory[:] = b"x" * len(bound.memory)
    assert bound.node == node and numa.node_of(bound.memory) in (node, None)


def test_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding to the node that is there works; to one that is not, the kernel refuses."""
    node = numa.memory_nodes()[0]
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    code = numa._mbind(memory, node)
    if code in (errno.ENOSYS, errno.EPERM):
        pytest.skip("no mbind in this kernel or container")
    assert code == 0
    monkeypatch.setattr(numa, "memory_nodes", lambda: (node, 900))
    with pytest.raises(Refused, match="NUMA node 900: Invalid argument"):
        numa.bound_memory(mmap.PAGESIZE, 900)


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(numa, "memory_nodes", lambda: (0, 1))
    with pytest.raises(Refused, match="not implemented") as caught:
        numa.bound_memory(mmap.PAGESIZE, 1)
    assert "bind=False" in caught.value.hint
