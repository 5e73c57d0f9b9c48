"""What vLLM's `--load-format sharded_state` finds per rank: one table per architecture.

Names are internal to vLLM: TESTED says which versions' own state each table was compared with.
"""

from __future__ import annotations

from typing import NamedTuple

TESTED = ("0.32.0",)


class Piece(NamedTuple):
    """A key (below its layer) and how ranks split it: "axis kind", "" where all hold it whole.

    rows or cols; heads, kv, vocab, inter (dense, over tp), expert (over all ranks), keys and values
    (heads of linear attention); rank0: zeros elsewhere. `section`: only the queries', keys' or
    values' rows (0, 1, 2) of a linear attention's qkv.
    """

    key: str
    split: str = ""
    section: int = -1


class Row(NamedTuple):
    """One output tensor of a layer or of the model; its pieces lie one after another in the rows.

    `when`: model, layer, dense (a layer without experts), moe. `interleaved`: the pieces' rows take
    turns. `dtype`: where it is not that of its pieces. `plain`: the name before vLLM 0.32. `given`:
    a key that the layer must have ("!key": must not). `flag`: a config field that must be true.
    """

    name: str
    pieces: tuple[Piece, ...] = ()
    when: str = "layer"
    dtype: str = ""
    constant: float | None = None
    optional: bool = False
    interleaved: bool = False
    experts: bool = False
    plain: str = ""
    given: str = ""
    flag: str = ""


class Architecture(NamedTuple):
    """The rows of one vLLM model class; `families` whose checkpoints it loads."""

    name: str
    families: tuple[str, ...]
    rows: tuple[Row, ...]
    wrapper: str = ""  # what the text model's names begin with where a vision model holds it
    even_only: bool = False  # vLLM asserts that ranks divide the intermediate size and the experts


def same(name: str, split: str = "", **options: object) -> Row:
    """Return a row that keeps its name."""
    return Row(name, (Piece(name, split),), **options)  # type: ignore[arg-type]  # named fields


def scales(attention: str) -> tuple[Row, ...]:
    """Return the scalars of an attention layer that no source has, all 1.0."""
    return tuple(
        Row(f"{attention}._{which}_scale", dtype="F32", constant=1.0)
        for which in ("q", "k", "v", "prob")
    )


def qkv(source: str, target: str, part: str, optional: bool = False) -> Row:
    """Return the row of q, k and v one after another."""
    pieces = tuple(
        Piece(f"{source}.{which}_proj.{part}", split)
        for which, split in (("q", "rows heads"), ("k", "rows kv"), ("v", "rows kv"))
    )
    return Row(f"{target}.qkv_proj.{part}", pieces, optional=optional)


def experts(prefix: str, *, interleaved: bool = False) -> tuple[Row, ...]:
    """Return the rows of the routed experts: gate over up, and down."""
    return (
        Row(
            f"{prefix}.routed_experts.w13_weight",
            (Piece("gate", "rows expert"), Piece("up", "rows expert")),
            when="moe",
            experts=True,
            interleaved=interleaved,
            plain=f"{prefix}.w13_weight",
        ),
        Row(
            f"{prefix}.routed_experts.w2_weight",
            (Piece("down", "cols expert"),),
            when="moe",
            experts=True,
            plain=f"{prefix}.w2_weight",
        ),
    )


def gate(name: str, *, dtype: str = "", plain: str = "") -> Row:
    """Return the row of the router."""
    source = name.replace("mlp.experts.gate", "mlp.gate")
    return Row(name, (Piece(source),), when="moe", dtype=dtype, plain=plain)


def shared(source: str) -> tuple[Row, ...]:
    """Return the rows of shared experts: split over tp, also under expert parallelism."""
    target = "mlp.experts._shared_experts._layer"
    pieces = tuple(Piece(f"{source}.{which}_proj.weight", "rows inter") for which in ("gate", "up"))
    return (
        Row(
            f"{target}.gate_up_proj.weight",
            pieces,
            when="moe",
            optional=True,
            plain=f"{source}.gate_up_proj.weight",
        ),
        Row(
            f"{target}.down_proj.weight",
            (Piece(f"{source}.down_proj.weight", "cols inter"),),
            when="moe",
            optional=True,
            plain=f"{source}.down_proj.weight",
        ),
    )


def correction(name: str, source: str, *, flag: str = "") -> Row:
    """Return the row of the router's correction bias, in float32."""
    return Row(
        name, (Piece(source),), when="moe", dtype="F32", optional=True, plain=source, flag=flag
    )
