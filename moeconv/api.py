"""What the command line is a thin layer over: inspect, plan, convert, verify, load."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.collector import paused
from moeconv.destination import decide, examine
from moeconv.errors import UsageError
from moeconv.layouts.options import Options
from moeconv.model import Model, build_model
from moeconv.plan import Plan, build_plan
from moeconv.store.source import open_source

if TYPE_CHECKING:  # what runs a plan takes half a second to import
    from moeconv.convert import Result
    from moeconv.execute import Report, Signal
    from moeconv.resources import Resources

Name = str | PathLike[str]


def inspect(
    src: Name,
    *,
    config: Name | None = None,
    orientation: str | None = None,
    experts_only: bool = False,
) -> Model:
    """Return the model that a source holds, read from headers alone; never imports torch.

    `experts_only`: of a GGUF source, whose other tensors may be more than moeconv knows.
    """
    with paused():
        source = open_source(Path(src), config=None if config is None else Path(config))
        return build_model(source, orientation=orientation, experts_only=experts_only)


def plan(src: Name, dst: Name | None = None, *, config: Name | None = None, **options: Any) -> Plan:
    """Return what a conversion with these options (as the command line names them) would write.

    With `dst`, also raises Refused for a directory in which it could not.
    """
    chosen = Options(**options)
    model = inspect(
        src, config=config, orientation=chosen.orientation, experts_only=chosen.experts_only
    )
    with paused():
        made = build_plan(model, chosen)
    if dst is not None:
        from moeconv.convert import check_apart

        check_apart(model.source.root, Path(dst))
        decide(examine(Path(dst)), made, Path(dst), overwrite=False)
        return replace(made, dst=Path(dst))
    return made


def convert(
    plan: Plan,
    dst: Name | None = None,
    *,
    resources: Resources | None = None,
    progress: Report | None = None,
    signal: Signal | None = None,
) -> Result:
    """Do what a plan says in `dst`, or in the plan's own; once more continues an interrupted one.

    Raises UsageError where neither says where to.
    """
    from moeconv.convert import convert_plan

    target = plan.dst if dst is None else Path(dst)
    if target is None:
        raise UsageError(
            "the plan has no DST", hint="moeconv.plan(src, dst), or convert(plan, dst)"
        )
    return convert_plan(plan, target, resources, report=progress, signal=signal)
