"""The rules that hold the code together, asserted by reading it: layers, sizes, docstrings."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "moeconv").rglob("*.py"))

MAX_FILE_LINES = 330
MAX_FUNCTION_LINES = 45
MAX_PARAMETERS = 6
# "path" or "path:function" -> why it may be larger. Empty is best.
EXCEPTIONS: dict[str, str] = {}

EVERYTHING = ("moeconv",)
VALUES = ("moeconv.types", "moeconv.errors")
# Room -> what it may import of moeconv. The longest prefix that fits a module is its room.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "moeconv.cli": EVERYTHING,
    "moeconv.__main__": EVERYTHING,
    "moeconv.types": (),
    "moeconv.errors": (),
    "moeconv.dims": VALUES,
    "moeconv.naming": VALUES,
    "moeconv.families": ("moeconv.families", "moeconv.naming", "moeconv.dims", *VALUES),
    "moeconv.layouts": (
        "moeconv.layouts",
        "moeconv.naming",
        "moeconv.dims",
        "moeconv.codecs.base",
        *VALUES,
    ),
    "moeconv.codecs": ("moeconv.codecs", *VALUES),
    "moeconv.kernels": ("moeconv.kernels", "moeconv.codecs", *VALUES),
    "moeconv.kernels.cpu": ("moeconv.kernels.cpu", "moeconv.codecs", *VALUES),
    "moeconv.kernels.gpu": ("moeconv.kernels.gpu", "moeconv.codecs", *VALUES),
    "moeconv.measure": (
        "moeconv.measure",
        "moeconv.kernels",
        "moeconv.codecs",
        "moeconv.store",
        "moeconv.demo",
        *VALUES,
    ),
    "moeconv.device": (
        "moeconv.device",
        "moeconv.arrange",
        "moeconv.codecs",
        "moeconv.decoding",
        "moeconv.parts",
        "moeconv.kernels",
        "moeconv.measure",
        "moeconv.store",
        "moeconv.tasks",
        "moeconv.torch_dtypes",
        *VALUES,
    ),
    "moeconv.collector": (),
    "moeconv.store": ("moeconv.store", "moeconv.gguf_config", "moeconv.collector", *VALUES),
    "moeconv.quantization": ("moeconv.quantization", "moeconv.codecs.base", *VALUES),
}
# Rooms that run a plan: families and layouts have done their work by then.
RUNNING = tuple(f"moeconv.{name}" for name in ("execute", "distribute", "process"))
NEVER_RUNNING = ("moeconv.families", "moeconv.layouts", "moeconv.cli")

# What runs on a GPU; choosing one (device/choose.py) looks for it first and then imports these.
USING_TORCH = tuple(f"moeconv.device.{name}" for name in ("gpu", "open", "pinned", "speed"))
# Heavy package -> the rooms that may import it at all, and those that may at module level.
HEAVY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "torch": (
        ("moeconv.codecs", "moeconv.kernels.gpu", "moeconv.device", "moeconv.cli", "moeconv"),
        ("moeconv.kernels.gpu", *USING_TORCH),
    ),
    "triton": (("moeconv.kernels.gpu",), ("moeconv.kernels.gpu",)),
    "numba": (("moeconv.kernels.cpu",), ()),
    "transformers": ((), ()),
    "compressed_tensors": ((), ()),
}
# Values in, values out: no files, clocks, environment, logging.
PURE = ("types", "errors", "dims", "naming", "families", "layouts", "quantization")
IMPURE = frozenset(
    "io os pathlib random shutil socket subprocess tempfile threading time".split()  # noqa: SIM905
)


class Import(NamedTuple):
    """One import: what, on which line, and whether it runs when the module is imported."""

    name: str
    line: int
    at_import: bool
    for_types: bool


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module: str, room: str) -> bool:
    """Return whether a module lies in a room: `quantization_rules` is in `quantization`."""
    return module == room or module.startswith((f"{room}.", f"{room}_"))


def room_of(module: str, rooms: dict[str, tuple[str, ...]]) -> str | None:
    """Return the narrowest room of a module."""
    return max((room for room in rooms if is_in(module, room)), key=len, default=None)


def imports_of(tree: ast.Module) -> list[Import]:
    """Return every import of a file, `from a import b` as both a and a.b."""
    found: list[Import] = []

    def walk(node: ast.AST, at_import: bool, for_types: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            typed = for_types or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"relative import on line {child.lineno}"
                module = child.module or ""
                names = [module, *(f"{module}.{alias.name}" for alias in child.names)]
            found.extend(Import(name, child.lineno, inside, typed) for name in names)  # type: ignore[attr-defined]
            walk(child, inside, typed)

    walk(tree, True, False)
    return found


MODULES = {module_name(path) for path in SOURCES}
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def test_the_readers_see_what_is_there() -> None:
    tree = ast.parse(
        "import os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "def f():\n    from moeconv import types\n"
    )
    assert [one.name for one in imports_of(tree) if one.at_import and not one.for_types] == [
        "os",
        "typing",
        "typing.TYPE_CHECKING",
    ]
    assert Import("torch", 4, True, True) in imports_of(tree)
    assert Import("moeconv.types", 6, False, False) in imports_of(tree)
    assert room_of("moeconv.kernels.cpu.base", MAY_IMPORT) == "moeconv.kernels.cpu"
    assert room_of("moeconv.quantization_rules", MAY_IMPORT) == "moeconv.quantization"
    assert room_of("moeconv.plan", MAY_IMPORT) is None


def test_rooms_import_only_the_rooms_below() -> None:
    wrong = []
    for path, tree in TREES.items():
        module = module_name(path)
        room = room_of(module, MAY_IMPORT)
        for one in imports_of(tree):
            if one.name not in MODULES or one.name == "moeconv":
                continue
            if room is None:
                allowed = not is_in(one.name, "moeconv.cli")
            else:
                allowed = any(is_in(one.name, target) for target in MAY_IMPORT[room])
                # the package of a module that may be imported
                allowed |= any(target.startswith(f"{one.name}.") for target in MAY_IMPORT[room])
            if any(is_in(module, running) for running in RUNNING):
                allowed &= not any(is_in(one.name, never) for never in NEVER_RUNNING)
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{one.line}: {module} imports {one.name}")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_stay_where_they_belong() -> None:
    wrong = []
    for path, tree in TREES.items():
        module = module_name(path)
        for one in imports_of(tree):
            package = one.name.split(".")[0]
            if package not in HEAVY or one.for_types:
                continue
            anywhere, top = HEAVY[package]
            room = room_of(module, MAY_IMPORT) or "moeconv"
            if room not in anywhere or (
                one.at_import and not any(is_in(module, place) for place in top)
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{one.line}: {module} imports {one.name}")
    assert not wrong, "\n".join(wrong)


def test_the_middle_is_pure() -> None:
    wrong = []
    for path, tree in TREES.items():
        if not any(is_in(module_name(path), f"moeconv.{room}") for room in PURE):
            continue
        for one in imports_of(tree):
            if one.name.split(".")[0] in IMPURE and not one.for_types:
                wrong.append(f"{path.relative_to(ROOT)}:{one.line}: imports {one.name}")
        wrong += [
            f"{path.relative_to(ROOT)}:{node.lineno}: opens a file"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ]
    assert not wrong, "\n".join(wrong)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, methods and inner ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameter_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters, keyword-only ones too, without self and cls.

    0 for a Triton kernel, which takes pointers, extents and strides one by one.
    """
    arguments = function.args
    if any(ast.unparse(one).startswith("triton.jit") for one in function.decorator_list):
        return 0
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    return len([one for one in (*named, *starred) if one.arg not in ("self", "cls")])


def test_files_and_functions_stay_small() -> None:
    large = {}
    for path, tree in TREES.items():
        name = str(path.relative_to(ROOT))
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            large[name] = f"{lines} lines; at most {MAX_FILE_LINES}"
        for function in functions(tree):
            place = f"{name}:{function.name}"
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                large[place] = f"{length} lines; at most {MAX_FUNCTION_LINES}"
            if (count := parameter_count(function)) > MAX_PARAMETERS:
                large[place] = f"{count} parameters; at most {MAX_PARAMETERS}"
    unexplained = [f"{place}: {why}" for place, why in large.items() if place not in EXCEPTIONS]
    assert not unexplained, "\n".join(unexplained)
    assert not EXCEPTIONS.keys() - large.keys(), "an exception that nothing needs any more"
    assert all(reason.strip() for reason in EXCEPTIONS.values())


def test_the_library_neither_prints_nor_logs() -> None:
    wrong = []
    for path, tree in TREES.items():
        if is_in(module_name(path), "moeconv.cli"):
            continue
        name = path.relative_to(ROOT)
        wrong += [
            f"{name}:{one.line}: logging"
            for one in imports_of(tree)
            if one.name.split(".")[0] in ("logging", "loguru", "warnings", "rich", "typer")
        ]
        wrong += [
            f"{name}:{node.lineno}: {ast.unparse(node)[:40]}"
            for node in ast.walk(tree)
            if (isinstance(node, ast.Name) and node.id == "print")
            or (
                isinstance(node, ast.Attribute)
                and ast.unparse(node) in ("sys.stdout", "sys.stderr")
            )
        ]
    assert not wrong, "\n".join(wrong)


def test_what_is_public_says_what_it_is() -> None:
    bare = []
    for path, tree in TREES.items():
        name = path.relative_to(ROOT)
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(f"{name}: the module")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
                not node.name.startswith("_") and ast.get_docstring(node) is None
            ):
                bare.append(f"{name}:{node.lineno}: {node.name}")
    assert not bare, "\n".join(bare)


def loaded_after(code: str) -> set[str]:
    """Return which heavy packages a fresh interpreter holds after running this code."""
    loaded = f"[name for name in {sorted(HEAVY)!r} if name in sys.modules]"
    report = f"import json, sys\nsys.stderr.write(json.dumps({loaded}))"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stderr.splitlines()[-1]))


HELP = """
import sys
sys.argv = ["moeconv", "--help"]
from moeconv.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("module", ["moeconv.codecs", "moeconv.model", "moeconv.plan"])
def test_reading_and_planning_stay_light(module: str) -> None:
    assert loaded_after(f"import {module}") == set()


def test_help_stays_light() -> None:
    assert loaded_after(HELP) == set()
