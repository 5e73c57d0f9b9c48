"""The options of a conversion, as values; the same names as the command line's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.errors import UsageError

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# Values of the options that are words, and the least value of those that are numbers.
WORDS: Mapping[str, tuple[str | None, ...]] = {
    "dense_dtype": (None, *DTYPES, "keep"),
    "placement": ("linear", "round-robin"),
    "uneven": (None, "refuse", "pad"),
    "vllm_names": ("routed", "plain"),
    "orientation": (None, "in-out", "out-in"),
    "nonfinite": ("error", "keep"),
}
LEAST: Mapping[str, int] = {
    "tp": 1,
    "dp": 1,
    "numa": 1,
    "redundant_experts": 0,
    "pad_intermediate": 1,
    "pad_hidden": 1,
    "max_file_size": 1,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What changes the bytes of an output, and which part of it is wanted.

    Sizes in bytes; `ranks` and `layers` None: all.
    """

    layout: str = "hf"
    dtype: str = "bf16"
    dense_dtype: str | None = None
    tp: int = 1
    dp: int = 1
    ep: bool = False
    placement: str = "linear"
    redundant_experts: int = 0
    expert_map: tuple[tuple[int, ...], ...] | None = None
    uneven: str | None = None
    pad_intermediate: int | None = None
    pad_hidden: int | None = None
    vllm_names: str = "routed"
    numa: int = 2
    ranks: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    experts_only: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    orientation: str | None = None
    max_file_size: int | None = None
    nonfinite: str = "error"

    @property
    def dense(self) -> str:
        """Return what the tensors outside the experts become."""
        if self.dense_dtype is not None:
            return self.dense_dtype
        return "bf16" if self.dtype in ("int4", "int8") else self.dtype

    @property
    def partial(self) -> bool:
        """Return whether only a part of the model is wanted."""
        return bool(self.layers is not None or self.experts_only or self.include or self.exclude)

    @property
    def pads(self) -> bool:
        """Return whether ranks may be filled up with zeros."""
        return (self.uneven or ("pad" if self.experts_only else "refuse")) == "pad"


def target_dtype(stored: str, wanted: str, *, expert: bool, plain: bool) -> str:
    """Return the dtype a weight becomes.

    Experts become `wanted`; of the others quantized and 16-bit ones do, F32 and F64 stay.
    """
    if wanted == "keep":
        return stored
    if not expert and plain and stored not in ("BF16", "F16"):
        return stored
    return DTYPES[wanted]


def check_values(options: Options) -> None:
    """Raise UsageError for a value that its option never takes, whatever the model."""
    for name, words in WORDS.items():
        value = getattr(options, name)
        if value not in words:
            known = ", ".join(word for word in words if word is not None)
            raise UsageError(f"--{name.replace('_', '-')} {value!r} is not one of {known}")
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is None and name not in ("tp", "dp", "numa", "redundant_experts"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value!r} is not a number from {least}")
    for name in ("include", "exclude"):
        if isinstance(getattr(options, name), str):
            raise UsageError(f"--{name} takes a sequence of patterns", hint="give a list of them")
