"""What was measured of a machine: values, and the JSON values that they are kept as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple, TypeVar

from moeconv.types import Json, Params

T = TypeVar("T")

FORMAT = 2  # of the JSON values

# Rows of `Figures.rates` that are no codec: what every conversion does to the bytes it writes.
WORKS = (COPY, TRANSPOSE, DIGEST) = ("copy", "transpose", "digest")
MEMORY = "memory"  # and the bits that the roofline reads
# Codec -> the parameter on which its kernel's speed depends most.
_VARIANTS: Mapping[str, str] = {
    "float": "dtype",
    "ggml": "type",
    "gptq": "bits",
    "packed-int": "bits",
}
# Codecs that are moved more than computed.
_MOVED = ("raw", "repeated")
# Codecs each variant of which has a kernel of its own, or none.
_APART = ("ggml", MEMORY)


class Rates(NamedTuple):
    """GB/s of output on one thread and on all; of the roofline beside it, 0 where there is none.

    Of codecs: of BF16 output. Of packed forms: of BF16 input.
    """

    title: str
    one: float
    all: float
    roof: float = 0.0
    roof_all: float = 0.0


class Disk(NamedTuple):
    """GB/s of one thread and of several; None where it was not measured.

    `direct`: whether that went past the page cache.
    """

    write: Rates | None = None
    read: Rates | None = None
    threads: int = 1
    direct: bool = False

    def over(self, before: Disk) -> Disk:
        """Return these figures, completed by those that were measured before."""
        if self.write is None:
            return before._replace(read=self.read)
        return self._replace(read=self.read or before.read)


class Device(NamedTuple):
    """GB/s of a GPU: host memory to it and back, bytes read and written of a copy on it, kernels.

    `start_seconds`: of a conversion of next to nothing that uses it. A kernel's roofline is a copy
    of as many bytes as it reads and writes.
    """

    start_seconds: float
    up: float
    down: float
    copy: float
    rates: Mapping[str, Rates]


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that was measured; `disks` by `disk_id`, `devices` by name.

    `start_seconds`: of a conversion of next to nothing.
    """

    threads: int
    start_seconds: float = 0.0
    rates: Mapping[str, Rates] = field(default_factory=dict)
    disks: Mapping[str, Disk] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)


def find_rates(rates: Mapping[str, Rates], key: str) -> Rates | None:
    """Return the rates of a key; those of the codec's slowest other variant if it has none.

    None where neither was measured.
    """
    exact, codec = rates.get(key), key.partition(" ")[0]
    if exact is not None or codec in _APART:
        return exact
    others = [one for name, one in rates.items() if name.partition(" ")[0] == codec]
    return min(others, key=lambda one: one.all, default=None)


def rate_key(codec: str, params: Params) -> str:
    """Return the key of a codec's rates: its name, and the variant where that matters.

    COPY of what is moved more than computed.
    """
    if codec in _MOVED:
        return COPY
    variant = _VARIANTS.get(codec)
    key = codec if variant is None else f"{codec} {params[variant]}"
    return f"{key} act-order" if params.get("act_order") else key


def roof_key(bits: int) -> str:
    """Return the key of the roofline that reads `bits` per value."""
    return f"{MEMORY} {bits}"


def as_json(figures: Figures) -> Json:
    """Return the figures as JSON values."""
    return {
        "format": FORMAT,
        "threads": figures.threads,
        "start_seconds": figures.start_seconds,
        "rates": {key: rates._asdict() for key, rates in figures.rates.items()},
        "disks": {
            key: {
                "write": disk.write and disk.write._asdict(),
                "read": disk.read and disk.read._asdict(),
                "threads": disk.threads,
                "direct": disk.direct,
            }
            for key, disk in figures.disks.items()
        },
        "devices": {
            key: device._asdict()
            | {"rates": {name: rates._asdict() for name, rates in device.rates.items()}}
            for key, device in figures.devices.items()
        },
    }


def from_json(value: Json) -> Figures | None:
    """Return the figures of `as_json`; None for anything else."""
    try:
        if value["format"] != FORMAT:
            return None
        return Figures(
            _count(value["threads"]),
            _number(value["start_seconds"]),
            _mapped(value["rates"], _rates),
            _mapped(value["disks"], _disk),
            _mapped(value["devices"], _device),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _mapped(value: Json, make: Callable[[Json], T]) -> dict[str, T]:
    return {str(key): make(one) for key, one in value.items()}


def _rates(value: Json) -> Rates:
    one, every = _number(value["one"]), _number(value["all"])
    if not one or not every:
        raise ValueError("a speed of nothing")
    return Rates(
        str(value["title"]), one, every, _number(value["roof"]), _number(value["roof_all"])
    )


def _disk(value: Json) -> Disk:
    write, read = (_rates(value[name]) if value[name] else None for name in ("write", "read"))
    return Disk(write, read, _count(value["threads"]), bool(value["direct"]))


def _device(value: Json) -> Device:
    up, down, copy = speeds = [_number(value[name]) for name in ("up", "down", "copy")]
    if not all(speeds):
        raise ValueError("a speed of nothing")
    rates = _mapped(value["rates"], _rates)
    return Device(_number(value["start_seconds"]), up, down, copy, rates)


def _count(value: Json) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a number of threads")
    return value


def _number(value: Json) -> float:
    if type(value) not in (int, float) or not isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a speed or a time")
    return float(value)
