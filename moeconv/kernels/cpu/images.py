"""Kernels as files of machine code, loaded without numba.

numba's own cache needs numba to load: half a second of imports and registries before the first
byte, and 60 MB. An image is the compiled function alone, as an object file that LLVM links: its
arguments are integers and addresses, its memory comes from malloc, and it refers to nothing else.
What is not of that kind gets no image.

ctypes takes a tenth of a microsecond for each argument, and there are 30. So an image has one, the
address of a block of int64: room for the results, for the status, and the arguments flattened.
"""

from __future__ import annotations

import ctypes
import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import xxhash

from moeconv.kernels.cpu.signatures import (
    ADDRESS,
    Type,
    block_slots,
    flattener,
    holds_addresses,
    native_types,
)

_binding: Any = import_module("llvmlite.binding")  # it has no annotations
ENTRY = "moeconv.block."  # what the name of an image's own function begins with

# What an image may leave to be linked: the C library's.
OUTSIDE = frozenset({"malloc", "free", "memcpy", "memmove", "memset"})
# numba's meminfo, which owns the memory of an array made inside a kernel: count of references,
# destructor, its argument, address of the elements, their bytes (numba/core/runtime/nrt.cpp).
MEMINFO = "{i64, i8*, i8*, i8*, i64}"
_MEMINFO_NBYTES = 48  # and who allocated it
# numba's runtime as far as kernels use it; it has no reason to be initialised.
_RUNTIME = f"""
declare ptr @malloc(i64)
declare void @free(ptr)
define ptr @NRT_MemInfo_alloc_aligned(i64 %nbytes, i32 %align) {{
  %step = zext i32 %align to i64
  %more = add i64 %step, {_MEMINFO_NBYTES}
  %total = add i64 %nbytes, %more
  %owner = call ptr @malloc(i64 %total)
  %none = icmp eq ptr %owner, null
  br i1 %none, label %end, label %fill
fill:
  %first = ptrtoint ptr %owner to i64
  %last = add i64 %first, %more
  %over = urem i64 %last, %step
  %start = sub i64 %last, %over
  %data = inttoptr i64 %start to ptr
  %at_data = getelementptr i64, ptr %owner, i64 3
  %at_nbytes = getelementptr i64, ptr %owner, i64 4
  store i64 1, ptr %owner
  store ptr %data, ptr %at_data
  store i64 %nbytes, ptr %at_nbytes
  br label %end
end:
  ret ptr %owner
}}
define void @NRT_MemInfo_call_dtor(ptr %owner) {{
  call void @free(ptr %owner)
  ret void
}}
"""


class Unsuited(Exception):
    """A function of which no image can be made; it runs as numba loads it."""


def make_image(dispatcher: Any, arguments: Sequence[Type]) -> bytes:
    """Return the image of what numba has just compiled; Unsuited where its code is of another kind.

    A line of JSON (symbol, what it returns), then the object code.
    """
    try:
        (result,) = dispatcher.overloads.values()
        symbol = str(result.fndesc.llvm_func_name)
        returned = _returned(str(result.fndesc.restype))
        expected = [ADDRESS, ADDRESS, *(one for kind in arguments for one in native_types(kind))]
        runtime = import_module("numba.core.runtime.nrtdynmod")
        if str(runtime._meminfo_struct_type) != MEMINFO:
            raise Unsuited("numba's arrays have another owner")
        if not holds_addresses():
            raise Unsuited("numpy's arrays hold their addresses elsewhere")
        module = _binding.parse_bitcode(result.library._final_module.as_bitcode())
        found = [str(one.type) for one in module.get_function(symbol).arguments]
        if [ADDRESS if one.endswith("*") else one for one in found] != expected:
            raise Unsuited("numba passes arguments in another way")
        entry = _entry(symbol, expected, _slots(returned), arguments)
        code = _object_code(module, entry, result.library._codegen._tm)
    except (AttributeError, LookupError, NameError, RuntimeError, ValueError) as error:
        raise Unsuited(str(error)) from error
    return json.dumps([f"{ENTRY}{symbol}", returned]).encode() + b"\n" + code


def _returned(kind: str) -> int | str:
    """Return what a function gives back: how many integers in a tuple, else numba's name of it."""
    if kind in ("none", "int64", "bool"):
        return kind
    if kind.startswith("UniTuple(int64 x "):
        return int(kind.split(" x ")[1].rstrip(")"))
    raise Unsuited(f"it returns {kind}")


def _slots(returned: int | str) -> int:
    """Return how many int64 of a block what comes back takes."""
    return returned if isinstance(returned, int) else 1


def _entry(symbol: str, types: Sequence[str], results: int, arguments: Sequence[Type]) -> str:
    """Return the LLVM assembly of a function that calls another with what lies in a block."""
    lines, given, slot = (
        [f"%status = getelementptr i64, ptr %block, i64 {results}"],
        [],
        results + 1,
    )
    for width in (one for kind in arguments for one in block_slots(kind)):
        value = f"%v{slot}"
        lines.append(f"%p{slot} = getelementptr i64, ptr %block, i64 {slot}")
        if not width:
            lines.append(f"{value} = load i64, ptr %p{slot}")
            given.append(f"i64 {value}")
            slot += 1
            continue
        lines += (
            f"%f{slot} = load ptr, ptr %p{slot}",
            f"{value} = load ptr, ptr %f{slot}",
            f"%q{slot} = getelementptr i64, ptr %block, i64 {slot + 1}",
            f"%n{slot} = load i64, ptr %q{slot}",
        )
        size = f"i64 %n{slot}, i64 {width}"
        given.append(f"ptr null, ptr null, {size}, ptr {value}, {size}")
        slot += 2
    called = ", ".join(("ptr %block", "ptr %status", *given))
    return f"""
declare i32 @"{symbol}"({", ".join(types)})
define i32 @"{ENTRY}{symbol}"(ptr %block) {{
  {f"{chr(10)}  ".join(lines)}
  %result = call i32 @"{symbol}"({called})
  ret i32 %result
}}
"""


def _object_code(module: Any, entry: str, machine: Any) -> bytes:
    """Return the object code of `entry` (LLVM assembly), and of all that it calls in a module."""
    # What counts references is kept apart by numba; inside of its callers, which have no owners
    # but for their scratch, nearly all of it goes: up to a fifth of the time of short rows.
    module = _binding.parse_assembly(str(module).replace(" noinline ", " alwaysinline "))
    for assembly in (_RUNTIME, entry):
        module.link_in(_binding.parse_assembly(assembly))
    for one in (*module.functions, *module.global_variables):
        if not one.is_declaration and not one.name.startswith(ENTRY):
            one.linkage = "internal"
    builder = _binding.create_pass_builder(machine, _binding.create_pipeline_tuning_options(0))
    passes = _binding.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, builder)
    code = bytes(machine.emit_object(module))
    left = outside_of(code) - OUTSIDE
    if left:
        raise Unsuited(f"it refers to {', '.join(sorted(left))}")
    return code


def outside_of(code: bytes) -> set[str]:
    """Return the symbols that a 64-bit ELF object leaves open; KeyError for another format.

    Linking what nobody has ends the process, and the compiler calls more than the module declares.
    """
    sections = {one.name(): one.data() for one in _binding.ObjectFileRef.from_data(code).sections()}
    names = sections[b".strtab"]
    return {
        names[at : names.index(b"\0", at)].decode()
        for at, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections[b".symtab"])
        if at and not section
    }


def write_image(path: Path, image: bytes) -> None:
    """Keep an image; whoever reads `path` meanwhile finds all of it or none. May raise OSError."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(xxhash.xxh3_64_digest(image) + image)
            file.flush()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink()
            raise


def read_image(path: Path) -> bytes | None:
    """Return a kept image; None where there is none, or none that is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[8:] if xxhash.xxh3_64_digest(data[8:]) == data[:8] else None


def load_image(image: bytes, arguments: Sequence[Type]) -> Callable[..., Any]:
    """Return a function that runs an image; it frees the GIL."""
    head, _, code = image.partition(b"\n")
    symbol, returned = json.loads(head)
    engine = _engine()
    engine.add_object_file(_binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    first = _slots(returned) + 1
    count = sum(2 if width else 1 for kind in arguments for width in block_slots(kind))
    make_block: Callable[[], Any] = ctypes.c_int64 * (first + count)
    fill, flatten = (
        struct.Struct(f"{count}q").pack_into,
        flattener(Type("Tuple", (tuple(arguments),))),
    )
    results: Mapping[int | str, Callable[[Any], Any]] = {
        "none": lambda block: None,
        "int64": lambda block: block[0],
        "bool": lambda block: block[0] != 0,
    }
    result: Callable[[Any], Any] = results.get(returned, lambda block: tuple(block[: first - 1]))
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
    native = prototype(engine.get_function_address(symbol))
    addressof = ctypes.addressof

    def run(*values: Any) -> Any:
        block = make_block()
        fill(block, 8 * first, *flatten(values))
        if native(addressof(block)) != 0:
            raise RuntimeError(f"{symbol} failed: out of memory?")
        return result(block)

    return run


@cache
def _engine() -> Any:
    """Return what links images; they live as long as the process."""
    _binding.initialize_native_target()
    _binding.initialize_native_asmprinter()
    machine = _binding.Target.from_default_triple().create_target_machine()
    return _binding.create_mcjit_compiler(_binding.parse_assembly(""), machine)
