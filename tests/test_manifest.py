"""The text of a manifest."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from moeconv.manifest import dump_json

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30
)


@given(VALUES)
def test_what_is_written_reads_back(value: object) -> None:
    assert json.loads(dump_json(value)) == value


def test_a_segment_is_a_line() -> None:
    text = dump_json({"files": [{"name": "a", "segments": [[0, 8, "ff"], [8, 4, "0e"]]}]}).decode()
    assert '\n    [0, 8, "ff"],\n    [8, 4, "0e"]\n' in text
    assert dump_json({}) == b"{}\n" and dump_json([]) == b"[]\n"
