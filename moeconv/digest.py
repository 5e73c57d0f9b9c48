"""Digests: xxh3-128 of bytes and of JSON values."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from moeconv.errors import IOFailed
from moeconv.types import Json

_CHUNK_NBYTES = 1 << 20


def canonical_json(value: Json) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def json_digest(value: Json) -> str:
    """Return the xxh3-128 (32 hex digits) of a value's canonical JSON."""
    return bytes_digest(canonical_json(value))


def bytes_digest(data: bytes) -> str:
    """Return the xxh3-128 (32 hex digits) of bytes."""
    return str(xxhash.xxh3_128_hexdigest(data))


def file_digest(path: Path) -> str:
    """Return the xxh3-128 (32 hex digits) of a file, read in bounded memory."""
    found = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_NBYTES):
                found.update(chunk)
    except OSError as error:
        raise IOFailed(f"reading failed: {error.strerror}", where=str(path)) from error
    return str(found.hexdigest())
