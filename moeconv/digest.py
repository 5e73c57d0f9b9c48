"""Digests: xxh3-128 of bytes and of JSON values."""

from __future__ import annotations

import json

import xxhash

from moeconv.types import Json


def canonical_json(value: Json) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def json_digest(value: Json) -> str:
    """Return the xxh3-128 (32 hex digits) of a value's canonical JSON."""
    return str(xxhash.xxh3_128_hexdigest(canonical_json(value)))
