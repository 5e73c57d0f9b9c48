"""Plan -> what `plan` says of it, as JSON values, and whether it could run here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from moeconv.convert import check_apart, chosen_files, needed_nbytes
from moeconv.destination import decide, examine
from moeconv.device.choose import uses_gpus, wanted_device
from moeconv.device.ways import decoded_by
from moeconv.errors import MoeconvError, Refused
from moeconv.execute import check_memory
from moeconv.manifest import accounting_facts
from moeconv.plan import Plan, option_facts
from moeconv.resources import Resources, choose_limits, memory_for
from moeconv.store.source import Source
from moeconv.store.space import check_space, check_writable, free_bytes
from moeconv.store.writer import partial_path
from moeconv.tasks import build_tasks
from moeconv.types import Json


class Needs(NamedTuple):
    """What a plan takes here; `floor_nbytes` is the smallest --memory.

    `estimate`: None where `moeconv bench` has not measured what it needs.
    """

    tasks: int
    floor_nbytes: int
    memory_nbytes: int
    jobs: int
    disk_nbytes: int
    reserved_nbytes: int
    free_nbytes: int
    devices: tuple[str, ...]
    estimate: Json | None


def measure(plan: Plan, dst: Path, resources: Resources) -> Needs:
    """Return what a plan takes: tasks, memory, disk, time."""
    from moeconv.cli.estimate_report import Means, describe_estimate, estimate_plan
    from moeconv.measure.stored import load_figures

    tasks = build_tasks(plan.weights, plan.files)
    limits = choose_limits(resources)
    wanted = wanted_device(resources.device, resources.vram_nbytes)
    decoded = decoded_by(tasks, plan.weights, plan.files) if wanted.cards else None
    cards = wanted.cards if uses_gpus(wanted, decoded) else ()
    floor = check_memory(tasks, plan.weights, plan.files)
    figures = load_figures()
    # Without --device cuda a GPU that bench could not use is one that convert will not use.
    known = wanted.insist or (figures and all(card.name in figures.devices for card in cards))
    means = Means(dst, limits.jobs, cards if known else ())
    estimate = estimate_plan(plan, tasks, figures, means) if figures else None
    return Needs(
        tasks=len(tasks),
        floor_nbytes=memory_for(floor),
        memory_nbytes=resources.memory_nbytes or memory_for(limits.memory_nbytes),
        jobs=limits.jobs,
        disk_nbytes=needed_nbytes(plan),
        reserved_nbytes=_reserved(plan, dst),
        free_nbytes=free_bytes(dst),
        devices=tuple(f"cuda:{card.number} {card.name}" for card in cards) or ("cpu",),
        estimate=estimate and describe_estimate(estimate),
    )


def _reserved(plan: Plan, dst: Path) -> int:
    """Return the bytes of this plan's files that lie in DST already."""
    total = 0
    for index in chosen_files(plan):
        final = dst / plan.files[index].name
        for path in (final, partial_path(final)):
            if path.is_file():
                total += path.stat().st_size
                break
    return total


def decide_action(plan: Plan, dst: Path, *, overwrite: bool) -> str:
    """Return what convert would do with DST; Refused as convert would be."""
    check_apart(plan.model.source.root, dst)
    return decide(examine(dst), plan, dst, overwrite=overwrite)


def find_refusals(
    plan: Plan, dst: Path, resources: Resources, needs: Needs
) -> tuple[str, list[MoeconvError]]:
    """Return (convert, continue, finished, replace or refused; every reason why it is refused)."""
    refusals: list[MoeconvError] = []
    action = "refused"
    try:
        action = decide_action(plan, dst, overwrite=resources.overwrite)
    except MoeconvError as error:
        refusals.append(error)
    if action != "finished" and needs.memory_nbytes < needs.floor_nbytes:
        mebibytes = -(-needs.floor_nbytes // (1 << 20))
        refusals.append(
            Refused(
                "--memory is too small for the largest block of this model",
                hint=f"--memory {mebibytes}MiB or more",
            )
        )
    if action in ("convert", "continue"):
        try:
            check_writable(dst)
            check_space(dst, needs.disk_nbytes, needs.reserved_nbytes)
        except Refused as error:
            refusals.append(error)
    return (action if not refusals else "refused"), refusals


def describe_source(source: Source) -> dict[str, Json]:
    """Return what a source is, as JSON values."""
    return {
        "path": str(source.root),
        "fingerprint": source.fingerprint,
        "tensors": len(source.tensors),
        "nbytes": sum(ref.nbytes for ref in source.tensors.values()),
    }


def describe_plan(plan: Plan, dst: Path, needs: Needs) -> dict[str, Json]:
    """Return everything that `plan` knows but whether it is refused."""
    written = set(chosen_files(plan))
    return {
        "source": describe_source(plan.model.source),
        "family": plan.model.family.name,
        "dst": str(dst),
        "layout": plan.options.layout,
        "options": dict(option_facts(plan.options)),
        "partial": plan.options.partial,
        "plan": plan.digest,
        "files": [
            {
                "name": file.name,
                "rank": file.rank,
                "tensors": len(file.tensors),
                "nbytes": file.nbytes,
                "written": index in written,
            }
            for index, file in enumerate(plan.files)
        ],
        "nbytes": plan.nbytes,
        "tasks": needs.tasks,
        "memory": {
            "nbytes": needs.memory_nbytes,
            "floor_nbytes": needs.floor_nbytes,
            "jobs": needs.jobs,
        },
        "devices": list(needs.devices),
        "disk": {
            "needed_nbytes": needs.disk_nbytes,
            "already_nbytes": needs.reserved_nbytes,
            "free_nbytes": needs.free_nbytes,
        },
        "estimate": needs.estimate,
        "accounting": accounting_facts(plan.accounting),
        "layout_facts": dict(plan.facts),
        "notes": list(plan.notes),
        "serve": serve_line(plan, dst),
    }


def serve_line(plan: Plan, dst: Path) -> str | None:
    """Return the command (or arguments) that serve an output; None where no engine loads it."""
    options = plan.options
    if options.partial or not plan.facts.get("vllm_loads", True):
        return None
    if options.layout == "ktransformers":
        from moeconv.layouts.ktransformers import launch_hint

        return launch_hint(plan.facts, shlex.quote(str(dst)))
    line = f"vllm serve {shlex.quote(str(dst))}"
    if options.layout != "vllm":
        return line
    line += f" --load-format sharded_state --tensor-parallel-size {options.tp}"
    return f"{line} --enable-expert-parallel" if options.ep else line


def serve_warning(plan: Plan) -> str | None:
    """Return what serving an output must not get wrong."""
    if plan.options.layout != "vllm" or plan.options.partial or not plan.facts["vllm_loads"]:
        return None
    return (
        f"the files fit --tensor-parallel-size {plan.options.tp} alone: at another size vLLM loads "
        "them without an error and computes nonsense"
    )


def source_line(facts: Json, source: Json) -> str:
    """Return the accounting in one line, from accounting_facts and describe_plan's source."""
    from moeconv.store.space import human

    states = facts["source"]
    count = {name: state["tensors"] for name, state in states.items()}
    parts = [
        f"{count['decoded'] + count['codec part']:,} decoded or codec parts",
        f"{count['copied']:,} copied",
        f"{count['dropped']:,} dropped",
    ]
    if count["not selected"]:
        parts.append(f"{count['not selected']:,} not selected")
    return (
        f"source: {source['tensors']:,} tensors, {human(source['nbytes'])}: {', '.join(parts)}"
        f" · output: {facts['output_tensors']:,} tensors, each element once"
    )
