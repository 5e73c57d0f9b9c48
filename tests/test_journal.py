from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.errors import IOFailed, Refused
from moeconv.journal import Entry, Header, Journal, Segment, _dump, _line, _proven, read_journal
from moeconv.store import system
from tests.store.faults import Nth, failing

HEADER = Header(plan="a1" * 16, source="ffee", tool="0.1.0")
ENTRIES = [
    Entry(
        task=7 * number,
        files=None if number == 3 else tuple(range(number)),
        segments=tuple(
            Segment(file, 4096 * number, 100, f"{number:032x}") for file in range(number)
        ),
        counts={"nan": number} if number % 2 else {},
    )
    for number in range(6)
]


def written(path: Path, entries: list[Entry], batch: int = 2) -> bytes:
    with Journal.create(path, HEADER) as journal:
        for start in range(0, len(entries), batch):
            journal.append(entries[start : start + batch])
    return path.read_bytes()


def reopened(path: Path) -> tuple[Header, list[Entry]] | None:
    """Return what `open` finds, having seen that the reader agrees and what stays is proven."""
    seen = read_journal(path)
    opened = Journal.open(path)
    if opened is None:
        assert seen is None
        return None
    journal, header, entries = opened
    journal.close()
    assert seen == (header, entries) == read_journal(path)
    return header, entries


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new/.moeconv/journal"
    with Journal.create(path, HEADER):
        assert reopened(path) == (HEADER, [])
    written(path, ENTRIES)
    assert reopened(path) == (HEADER, ENTRIES)
    assert not (tmp_path / "new/.moeconv/journal.partial").exists()


def test_appending_goes_on_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    once = written(path, ENTRIES)
    written(path, ENTRIES[:3])
    opened = Journal.open(path)
    assert opened is not None
    journal, _, entries = opened
    with journal:
        journal.append([])
        journal.append(ENTRIES[len(entries) :])
    assert path.read_bytes() == once


def test_none_where_there_is_no_journal(tmp_path: Path) -> None:
    assert reopened(tmp_path / "journal") is None
    (tmp_path / "journal").write_bytes(b"")
    assert reopened(tmp_path / "journal") is None
    (tmp_path / "journal").write_bytes(b"\x00" * 5000 + b"\n")
    assert reopened(tmp_path / "journal") is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole") / "journal", ENTRIES)


def is_prefix(found: tuple[Header, list[Entry]] | None) -> bool:
    return found is None or (found[0] == HEADER and found[1] == ENTRIES[: len(found[1])])


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_flips_and_any_end_leave_a_prefix(
    tmp_path: Path, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path / "journal"
    garbled = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        garbled[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.binary(max_size=60) | st.just(b"\x00" * 4096) | st.just(b"\n"))
    path.unlink(missing_ok=True)  # quicker than to replace its bytes
    path.write_bytes(bytes(garbled[:end]) + tail)
    found = reopened(path)
    assert is_prefix(found)
    damaged = next((i for i in range(end) if garbled[i] != whole[i]), end)
    assert (len(found[1]) + 1 if found else 0) >= whole[:damaged].count(b"\n")


def test_each_byte_flipped_loses_its_line_and_what_follows(whole: bytes) -> None:
    payloads, end, _ = _proven(whole)
    assert (len(payloads), end) == (len(ENTRIES) + 1, len(whole))
    for position in range(len(whole)):
        for bit in (0, 5, 7):
            garbled = bytearray(whole)
            garbled[position] ^= 1 << bit
            proven_count = whole[:position].count(b"\n")
            assert _proven(bytes(garbled))[0] == payloads[:proven_count]


def test_lines_removed_moved_or_repeated_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = written(path, ENTRIES).splitlines(keepends=True)
    cases = (
        (lines[:2] + lines[3:], 1),
        (lines[:3] + lines[2:], 2),
        ([lines[0], lines[2], lines[1]], 0),
    )
    for changed, entry_count in cases:
        path.write_bytes(b"".join(changed))
        assert reopened(path) == (HEADER, ENTRIES[:entry_count])


def test_opening_cuts_the_torn_end_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = written(path, ENTRIES)
    path.write_bytes(whole[:-5])
    assert reopened(path) == (HEADER, ENTRIES[:-1])
    assert path.read_bytes() == whole[: whole[:-1].rindex(b"\n") + 1]
    path.write_bytes(whole[:-5])
    read_journal(path)
    assert path.read_bytes() == whole[:-5]


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    line, _ = _line(_dump({"format": 2, **HEADER._asdict()}), 0)
    (tmp_path / "journal").write_bytes(line)
    with pytest.raises(Refused, match="format 2"):
        Journal.open(tmp_path / "journal")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", ["pwrite", "sync_data"])
def test_a_failed_append_can_be_repeated(tmp_path: Path, name: str, code: int) -> None:
    path = tmp_path / "journal"
    whole = written(path, ENTRIES)
    with Journal.create(path, HEADER) as journal:
        journal.append(ENTRIES[:2])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(IOFailed) as failure:
            patch.setattr(system, name, failing(code))
            journal.append(ENTRIES[2:])
        assert str(path) in failure.value.where
        assert "same command continues" in failure.value.hint
        assert is_prefix(reopened(path))
        journal.append(ENTRIES[2:])
    assert path.read_bytes() == whole


def test_a_torn_append_followed_by_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal.create(path, HEADER) as journal:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(IOFailed):
            real = os.pwrite
            patch.setattr(system, "pwrite", Nth("pwrite", 2, failing(errno.EIO)))
            patch.setattr(system.pwrite, "_real", lambda fd, data, at: real(fd, data[:-9], at))
            journal.append(ENTRIES)
        assert is_prefix(reopened(path))
        journal.append(ENTRIES[:1])
    found = reopened(path)
    assert found is not None
    assert is_prefix(found)
    assert len(found[1]) >= 1


@pytest.mark.parametrize("name", ["open_file", "pwrite", "sync_file", "rename"])
def test_a_failed_creation_leaves_the_old_journal(tmp_path: Path, name: str) -> None:
    path = tmp_path / "journal"
    written(path, ENTRIES)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(IOFailed):
        patch.setattr(system, name, failing(errno.EIO))
        Journal.create(path, Header("other", "", ""))
    assert reopened(path) == (HEADER, ENTRIES)


def test_entries_are_durable_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    write, sync = system.pwrite, system.sync_data
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        monkeypatch.setattr(system, "pwrite", lambda *a: order.append("write") or write(*a))
        monkeypatch.setattr(system, "sync_data", lambda *a: order.append("sync") or sync(*a))
        journal.append(ENTRIES)
    assert order == ["write", "sync"]
