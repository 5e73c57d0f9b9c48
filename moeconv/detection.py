"""The codec of every group of tensors: found from headers, completed from a few tiny payloads."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import numpy as np

from moeconv.codecs import CODECS
from moeconv.codecs.base import Codec, QuantScheme
from moeconv.codecs.bits import PEEK, PeekingCodec
from moeconv.codecs.nf4 import STATE
from moeconv.errors import BadSource, IncompleteModel, UnrecognizedTensor
from moeconv.families.parts import CARRIERS
from moeconv.grouping import Group
from moeconv.quantization import Quantization
from moeconv.store.reader import Reader
from moeconv.types import FLOAT_DTYPES, Params, TensorRef

SAMPLES = 8  # groups of one signature whose payloads are compared while planning
_PEEK_NBYTES = 1 << 20  # of one payload; of larger stacked ones the first slots
_STATE_NBYTES = 1 << 16
_PLAIN = ("float", "raw", "ggml")  # codecs that no quantization config speaks of
_PEEK_DTYPES = {"I32": np.int32, "I64": np.int64}


class Detected(NamedTuple):
    """A group's codec, its parameters and the decoded shape as stored."""

    codec: Codec
    params: Params
    shape: tuple[int, ...]


class _Kind(NamedTuple):
    """All groups of one signature: detected once, by the first of them."""

    detected: Detected
    headers: Params  # the parameters before any payload was read
    groups: list[Group]


class Detector:
    """Group -> codec; what it has seen stands for every group with the same headers and scheme."""

    def __init__(self, quantization: Quantization, reader: Reader) -> None:
        self.quantization = quantization
        self.reader = reader
        self._kinds: dict[Hashable, _Kind] = {}

    def detect(self, group: Group, *, vector: bool = False) -> Detected:
        """Return the one codec that takes exactly these parts; BadSource if none or two do."""
        scheme = QuantScheme("", {}) if vector else self._scheme(group)
        signature = (
            frozenset((part, ref.dtype, ref.shape) for part, ref in group.parts.items()),
            scheme.method,
            frozenset(scheme.values.items()),
        )
        kind = self._kinds.get(signature)
        if kind is None:
            found = self._detect(group, scheme)
            self._check_scheme(group, found, scheme)
            settled = self._settle(group, found)
            kind = self._kinds[signature] = _Kind(settled, found.params, [])
        kind.groups.append(group)
        return kind.detected

    def finish(self) -> tuple[str, ...]:
        """Return notes; BadSource where groups with the same headers are of different kinds."""
        notes = []
        self._check_parts()
        for kind in self._kinds.values():
            name = kind.detected.codec.name
            if name not in PEEK:
                continue
            step = max(len(kind.groups) // SAMPLES, 1)
            for group in (*kind.groups[1::step], kind.groups[-1]):
                self._compare(group, kind)
            before = kind.headers.get("zero_offset")
            after = kind.detected.params.get("zero_offset")
            if before != after:
                version = {1: "gptq (v1)", 0: "gptq_v2"}
                notes.append(
                    f"zero points are stored as {version[int(cast(int, after))]}, although the "
                    f"config says {version[int(cast(int, before))]}: {len(kind.groups)} weights "
                    f"like '{kind.groups[0].name}'"
                )
        return tuple(notes)

    def _scheme(self, group: Group) -> QuantScheme:
        """Return what the config says of a group, and what bitsandbytes says beside each weight."""
        scheme = self.quantization.scheme(group.name)
        state = group.parts.get(STATE)
        if state is None:
            return scheme
        if state.nbytes > _STATE_NBYTES:
            raise BadSource(f"'{state.name}' has {state.nbytes} bytes of JSON", where=state.file)
        payload = bytearray(state.nbytes)
        self.reader.read_into(state.file, state.offset, payload)
        text = payload.decode("utf-8", "replace")
        return scheme._replace(values={**scheme.values, "quant_state": text})

    def _detect(self, group: Group, scheme: QuantScheme) -> Detected:
        parts = group.parts
        found = [
            (codec, params)
            for codec in CODECS.values()
            if (params := codec.detect(parts, scheme)) is not None
        ]
        if len(found) == 1:
            codec, params = found[0]
            return Detected(codec, params, codec.shape(parts, params))
        missing = "" if found else self._missing(group)
        where = next(iter(parts.values())).file
        if missing:
            raise IncompleteModel(
                missing,
                where=where,
                hint="a file of the checkpoint is missing or damaged; download it again",
            )
        listing = ", ".join(f"{ref.name} {ref.dtype} {list(ref.shape)}" for ref in parts.values())
        takers = " and ".join(codec.name for codec, _ in found) or "no codec"
        raise UnrecognizedTensor(
            f"{takers} takes the parts of '{group.name}': {listing}"
            f" (config: {scheme.method or 'not quantized'})",
            where=where,
            hint="a part is missing, or the config does not belong to these files",
        )

    def _missing(self, group: Group) -> str:
        """Return what a group lacks: a part that others have, or any scale at all; "" if neither.

        Others: groups in which the parts that this one has are of the same dtypes.
        """
        have = {part: ref.dtype for part, ref in group.parts.items()}
        for kind in self._kinds.values():
            other = kind.groups[0]
            theirs = {part: ref.dtype for part, ref in other.parts.items()}
            if have.items() < theirs.items():
                lacking = ", ".join(part for part in theirs if part not in have)
                return f"'{group.name}' has no {lacking}, which '{other.name}' has"
        carrier = next((part for part in have if part in CARRIERS), "")
        if set(have) == {carrier} and have[carrier] not in FLOAT_DTYPES:
            ref = group.parts[carrier]
            return f"'{ref.name}' is {ref.dtype} {list(ref.shape)} and has no scale beside it"
        return ""

    def _check_scheme(self, group: Group, found: Detected, scheme: QuantScheme) -> None:
        if scheme.method or not self.quantization.method or found.codec.name in _PLAIN:
            return
        listing = ", ".join(f"{ref.name} {ref.dtype}" for ref in group.parts.values())
        raise BadSource(
            f"'{group.name}' is quantized ({found.codec.name}: {listing}), but the config leaves "
            "it out of the quantization",
            where=next(iter(group.parts.values())).file,
            hint="config.json does not belong to these files",
        )

    def _check_parts(self) -> None:
        """Raise where one codec meets groups with and without an optional part in one scheme."""
        first: dict[Hashable, _Kind] = {}
        for (_, method, values), kind in self._signed():
            if kind.detected.codec.name in _PLAIN:
                continue
            other = first.setdefault((kind.detected.codec.name, method, values), kind)
            bare, whole = sorted((other, kind), key=lambda one: len(one.groups[0].parts))
            lacking = set(whole.groups[0].parts) - set(bare.groups[0].parts)
            if lacking and set(bare.groups[0].parts) < set(whole.groups[0].parts):
                raise IncompleteModel(
                    f"'{bare.groups[0].name}' has no {', '.join(sorted(lacking))}, which "
                    f"'{whole.groups[0].name}' has",
                    where=next(iter(bare.groups[0].parts.values())).file,
                    hint="a file of the checkpoint is missing or damaged; download it again",
                )

    def _signed(self) -> Sequence[tuple[tuple[Hashable, Hashable, Hashable], _Kind]]:
        return [
            (cast(tuple[Hashable, Hashable, Hashable], signature), kind)
            for signature, kind in self._kinds.items()
        ]

    def _settle(self, group: Group, found: Detected) -> Detected:
        """Return what headers and the group's payloads say together."""
        codec = found.codec
        payloads = {
            part: self._peek(group.parts[part])
            for part in PEEK.get(codec.name, ())
            if part in group.parts and 0 not in group.parts[part].shape
        }
        if not payloads:
            return found
        params = cast(PeekingCodec, codec).settle(group.parts, found.params, payloads)
        return Detected(codec, params, codec.shape(group.parts, params))

    def _compare(self, group: Group, kind: _Kind) -> None:
        again = self._settle(group, kind.detected._replace(params=kind.headers))
        if again.params == kind.detected.params:
            return
        differing = {
            name: (value, again.params.get(name))
            for name, value in kind.detected.params.items()
            if again.params.get(name) != value
        }
        facts = ", ".join(f"{name} {ours}, {its}" for name, (ours, its) in differing.items())
        raise BadSource(
            f"'{kind.groups[0].name}' and '{group.name}' have the same headers, but are stored "
            f"differently: {facts}",
            where=next(iter(group.parts.values())).file,
            hint="the checkpoint is put together from two; quantize it again",
        )

    def _peek(self, ref: TensorRef) -> np.ndarray:
        """Return a payload, of a large stacked one the slots that come first."""
        dtype = _PEEK_DTYPES.get(ref.dtype)
        if dtype is None:
            raise BadSource(
                f"'{ref.name}' is {ref.dtype}; {' or '.join(_PEEK_DTYPES)} is expected",
                where=ref.file,
            )
        shape = ref.shape
        if len(shape) > 2 and ref.nbytes > _PEEK_NBYTES:
            shape = (max(_PEEK_NBYTES * shape[0] // ref.nbytes, 1), *shape[1:])
        payload = np.empty(shape, dtype)
        self.reader.read_into(ref.file, ref.offset, payload)
        return payload
