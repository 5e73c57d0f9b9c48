"""Model + Options -> Plan: every output file, tensor and byte, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from moeconv.accounting import Accounting, account, check_drafts
from moeconv.arrange import OutFile, arrange_hf, arrange_layers, arrange_ranks
from moeconv.dense import check_dense
from moeconv.digest import json_digest
from moeconv.errors import Refused, UsageError
from moeconv.families.config_fields import CONFIG_SECTIONS
from moeconv.keeping import keeps_quantization, kept_model, kept_tiles
from moeconv.layouts.base import Draft, Layouted
from moeconv.layouts.hf import draft_hf
from moeconv.layouts.ktransformers import KtView, draft_ktransformers
from moeconv.layouts.options import Options, check_values
from moeconv.layouts.vllm import draft_vllm
from moeconv.layouts.vllm_split import View
from moeconv.model import Model
from moeconv.types import Json, Weight

FORMAT_VERSION = 1  # of the manifest and of how outputs are laid out
DEFAULT_MAX_FILE_NBYTES = 5 * 10**9  # hf: as transformers' save_pretrained


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will write and from what; `digest` names it."""

    model: Model
    options: Options
    files: tuple[OutFile, ...]
    accounting: Accounting
    facts: Mapping[str, Json]
    notes: tuple[str, ...]
    digest: str
    dst: Path | None = None  # where to, if that was said; no part of the digest

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.model.weights

    @property
    def is_model(self) -> bool:
        """Return whether the output is a model's directory, with its configs and tokenizer."""
        row = next(one for one in LAYOUTS if one.name == self.options.layout)
        return row.model and not self.options.partial

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Return the names of the source's files that are copied as they are."""
        return tuple(self.model.source.auxiliary) if self.is_model else ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all output files."""
        return sum(file.nbytes for file in self.files)


class Layout(NamedTuple):
    """One row of LAYOUTS: what `--layout NAME` can do.

    `model`: a whole output is a model's directory: configs and tokenizer go with it.
    """

    name: str
    dtypes: tuple[str, ...]
    ranks: bool
    model: bool = True


LAYOUTS: tuple[Layout, ...] = (
    Layout("hf", ("bf16", "fp16", "fp32", "keep"), False),
    Layout("vllm", ("bf16", "fp16", "fp32", "keep"), True),
    Layout("ktransformers", ("int4", "int8", "bf16", "keep"), False, model=False),
)


def build_plan(model: Model, options: Options) -> Plan:
    """Return the plan; Refused for options that the model or layout does not have."""
    layout = check_options(model, options)
    if layout.name != "ktransformers" and not options.partial:
        check_dense(model.weights, model.expert_layers, model.sizes, model.source.config)
    held = kept_model(model, options)
    laid_out = _draft(model, held, options)
    drafts = _selected(laid_out.drafts, options)
    if not drafts:
        raise Refused(
            "nothing is selected: no output tensor fits --layers, --include and --exclude",
            hint="moeconv plan without them lists what there is",
        )
    check_drafts(drafts)
    if layout.ranks:
        files, notes = arrange_ranks(drafts, options.tp * options.dp, options.max_file_size)
    elif layout.name == "ktransformers":
        files, notes = arrange_layers(drafts, options.max_file_size)
    else:
        files, notes = arrange_hf(drafts, options.max_file_size or DEFAULT_MAX_FILE_NBYTES)
    accounting = account(held, drafts, laid_out.unused, partial=options.partial)
    _check_ranks(files, options)
    return Plan(
        held,
        options,
        files,
        accounting,
        {**laid_out.facts, **_kept_facts(model, options)},
        (*model.notes, *laid_out.notes, *notes),
        _digest(model, options, files),
    )


def _kept_facts(model: Model, options: Options) -> Mapping[str, Json]:
    return {"quantization": "kept"} if keeps_quantization(model, options) else {}


def check_options(model: Model, options: Options) -> Layout:
    """Return the layout's row; raise where an option does not go with the layout or the model."""
    check_values(options)
    layout = next((one for one in LAYOUTS if one.name == options.layout), None)
    if layout is None:
        names = ", ".join(one.name for one in LAYOUTS)
        raise UsageError(f"--layout {options.layout} is not one of {names}")
    if options.dtype not in layout.dtypes:
        raise Refused(
            f"--layout {layout.name} cannot write --dtype {options.dtype}",
            hint=f"it can write {', '.join(layout.dtypes)}",
        )
    if layout.name != "ktransformers" and options.numa != Options().numa:
        raise Refused(
            f"--numa goes with --layout ktransformers, not with --layout {layout.name}",
            hint="leave it out",
        )
    for name, default in RANK_OPTIONS.items():
        if not layout.ranks and getattr(options, name) != default:
            raise Refused(
                f"--{name.replace('_', '-')} goes with a layout that has ranks, not with "
                f"--layout {layout.name}",
                hint="--layout vllm",
            )
    if not options.ep:
        for name in EP_OPTIONS:
            if getattr(options, name) != RANK_OPTIONS[name]:
                raise Refused(f"--{name.replace('_', '-')} needs --ep", hint="add --ep")
    if options.layers is not None and model.sizes.layers is not None:
        known = {weight.layer for weight in model.weights}
        wrong = [layer for layer in options.layers if layer not in known]
        if wrong:
            raise Refused(
                f"--layers names layer {wrong[0]}; the model has layers 0 to "
                f"{max(layer for layer in known if layer is not None)}"
            )
    return layout


RANK_OPTIONS: Mapping[str, Json] = {
    "tp": 1,
    "dp": 1,
    "ep": False,
    "placement": "linear",
    "redundant_experts": 0,
    "expert_map": None,
    "uneven": None,
    "pad_intermediate": None,
    "pad_hidden": None,
    "ranks": None,
    "vllm_names": "routed",
}
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation")
EP_OPTIONS = ("placement", "redundant_experts", "expert_map")


def _draft(model: Model, held: Model, options: Options) -> Layouted:
    if options.layout == "hf":
        return draft_hf(_in_order(held.weights), options)
    if options.layout == "ktransformers":
        return draft_ktransformers(_kt_view(model, held, options), options)
    sizes = model.sizes
    kept = keeps_quantization(model, options)
    view = View(
        model.family.name,
        model.places,
        model.expert_layers,
        heads=sizes.heads or 1,
        kv_heads=sizes.kv_heads or 1,
        layers=sizes.layers or 0,
        tied=sizes.tied,
        config=model.source.config,
        method=model.quantization.method if kept else "",
        held=held.places if kept else None,
        tiles=kept_tiles,
    )
    return draft_vllm(view, options)


def _kt_view(model: Model, held: Model, options: Options) -> KtView:
    config = model.source.config
    sections = [config, *(config[name] for name in CONFIG_SECTIONS if name in config)]
    said = [section for section in sections if isinstance(section, Mapping)]
    acts = [one[name] for one in said for name in ACTIVATION_FIELDS if one.get(name)]
    clamps = [one["swiglu_limit"] for one in said if one.get("swiglu_limit")]
    return KtView(
        model.family.name,
        model.places,
        model.expert_layers,
        activation=str(acts[0]) if acts else "",
        swiglu_limit=float(clamps[0]) if clamps else 0.0,
        held=held.places if options.dtype == "keep" else None,
    )


def _in_order(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the weights by run of layers, layer, expert and name, however the files order them."""
    return tuple(
        sorted(
            weights,
            key=lambda weight: (
                weight.stack != "main",
                weight.stack,
                -1 if weight.layer is None else weight.layer,
                -1 if weight.expert is None else weight.expert,
                weight.name,
            ),
        )
    )


def _selected(drafts: Sequence[Draft], options: Options) -> tuple[Draft, ...]:
    """Return the drafts that --layers, --experts-only, --include and --exclude leave."""
    chosen = drafts
    if options.layers is not None:
        layers = set(options.layers)
        chosen = [draft for draft in chosen if draft.layer in layers]
    if options.experts_only:
        chosen = [draft for draft in chosen if draft.constant is not None or _is_expert(draft)]
    if options.include:
        chosen = [draft for draft in chosen if _fits(draft, options.include)]
    if options.exclude:
        chosen = [draft for draft in chosen if not _fits(draft, options.exclude)]
    return tuple(chosen)


def _is_expert(draft: Draft) -> bool:
    return any(fill.experts is not None for fill in draft.fills)


def _fits(draft: Draft, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(draft.name, glob) for glob in globs)


def _check_ranks(files: Sequence[OutFile], options: Options) -> None:
    known = {file.rank for file in files}
    wrong = sorted(set(options.ranks or ()) - known)
    if wrong:
        raise Refused(
            f"--ranks names rank {wrong[0]}; there are ranks 0 to {max(known)}",
            hint="ranks = --tp x --dp",
        )


def _digest(model: Model, options: Options, files: Sequence[OutFile]) -> str:
    """Return the xxh3-128 of everything that decides the output's bytes."""
    return json_digest(
        {
            "format": FORMAT_VERSION,
            "source": model.source.fingerprint,
            "options": option_facts(options),
            "files": [file.describe() for file in files],
        }
    )


def option_facts(options: Options) -> Mapping[str, Json]:
    """Return the options that change bytes (or what is written), as JSON values.

    A default that is given is the same as none.
    """
    names = [name for name in options.__dataclass_fields__ if name != "ranks"]
    if options.layout == "hf" and options.max_file_size == DEFAULT_MAX_FILE_NBYTES:
        options = replace(options, max_file_size=None)
    if replace(options, dense_dtype=None).dense == options.dense:
        options = replace(options, dense_dtype=None)
    if replace(options, uneven=None).pads == options.pads:
        options = replace(options, uneven=None)
    return {name: _plain(getattr(options, name)) for name in names}


def _plain(value: Json) -> Json:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
