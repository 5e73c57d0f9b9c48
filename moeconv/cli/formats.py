"""moeconv formats: families, codecs and layouts, what each can do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from moeconv.cli.tables import Printer
from moeconv.types import Json


def describe_formats() -> dict[str, Json]:
    """Return the registries as JSON values."""
    from moeconv.codecs import CODECS
    from moeconv.device.ways import KERNEL, REFERENCE, way_of_codec
    from moeconv.families.tables import FAMILIES
    from moeconv.kernels.cpu import KERNELS
    from moeconv.plan import LAYOUTS

    return {
        "families": [
            {
                "name": family.name,
                "model_types": list(family.model_types),
                "example": family.example,
            }
            for family in FAMILIES
        ],
        "codecs": [
            {
                "name": name,
                "meaning": (inspect.getdoc(codec) or "").partition("\n")[0],
                "on_cpu": KERNEL if name in KERNELS else REFERENCE,
                "on_gpu": way_of_codec(name),
            }
            for name, codec in CODECS.items()
        ],
        "layouts": [
            {"name": layout.name, "dtypes": list(layout.dtypes), "ranks": layout.ranks}
            for layout in LAYOUTS
        ],
    }


def formats_command(values: Mapping[str, Json]) -> int:
    """List the model families, codecs and layouts that moeconv knows."""
    facts = describe_formats()
    printer = Printer(values)
    printer.json(facts)
    printer.table(
        ("family", "model_type", "example"),
        [(one["name"], ", ".join(one["model_types"]), one["example"]) for one in facts["families"]],
    )
    printer.line()
    printer.table(
        ("codec (read)", "on a CPU", "on a GPU", "meaning"),
        [(one["name"], one["on_cpu"], one["on_gpu"], one["meaning"]) for one in facts["codecs"]],
    )
    printer.line("cpu: as without a GPU; ggml's types without a kernel take gguf-py's decoder")
    printer.line()
    printer.table(
        ("layout (written)", "dtypes", "per rank"),
        [
            (one["name"], ", ".join(one["dtypes"]), "yes" if one["ranks"] else "no")
            for one in facts["layouts"]
        ],
    )
    return 0
