"""Where compiled kernels are kept, what happens where they cannot be, and what is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moeconv
from moeconv.kernels.cpu.images import read_image, write_image

ROOT = Path(moeconv.__file__).parents[1]
# Use one kernel, and tell where the cache is and whether numba was needed.
USE = """
import sys
import numpy as np
from moeconv.kernels.cpu import copies
from moeconv.kernels.cpu.cache import cache_directory
assert copies.count_nonfinite(np.full(2, np.inf, np.float32), "F32") == (0, 2)
print(cache_directory(), "numba" in sys.modules)
"""
# The same with a numba whose code no image can be made of; hits in numba's own cache.
USE_NUMBAS = (
    """
from moeconv.kernels.cpu import images
images.MEMINFO = "of another release"
"""
    + USE.replace('"numba" in sys.modules', "sum(copies._count._call.stats.cache_hits.values())")
    + """
import numba
print(repr(numba.config.CACHE_DIR))
"""
)

# Tell where the cache is, and compile nothing.
LOOK = "from moeconv.kernels.cpu.cache import cache_directory; print(cache_directory())"


def start(code: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.split()


def kept(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.image"))


def test_import_is_free_of_torch(tmp_path: Path) -> None:
    code = "import sys, moeconv.kernels.cpu; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert finish(start(code, {"HOME": str(tmp_path)})) == ["False", "False"]


def test_two_processes_share_the_users_cache(tmp_path: Path) -> None:
    """Two that compile at once, then one that finds what they left."""
    environ = {"HOME": str(tmp_path)}
    racing = [start(USE, environ), start(USE, environ)]
    for process in racing:
        where, compiled = finish(process)
        assert Path(where).parent == tmp_path / ".cache" / "moeconv"
        assert compiled == "True"
    (image,) = kept(tmp_path)
    whole = image.read_bytes()
    assert finish(start(USE, environ))[1] == "False"
    image.write_bytes(whole[:-1])  # by a crash: compiled again, not fatal
    assert finish(start(USE, environ))[1] == "True"
    assert image.read_bytes() == whole
    assert list(image.parent.iterdir()) == [image]


def test_a_damaged_image_is_none(tmp_path: Path) -> None:
    path = tmp_path / "some.image"
    assert read_image(path) is None
    write_image(path, b"code")
    assert read_image(path) == b"code"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert read_image(path) is None


def test_numbas_own_cache_keeps_what_no_image_can_be_made_of(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    where, hits, untouched = finish(start(USE_NUMBAS, environ))
    assert hits == "0"
    assert untouched == "''"
    files = sorted(Path(where).rglob("*.nb[ic]"))
    assert [file.suffix for file in files] == [".nbc", ".nbi"]
    assert finish(start(USE_NUMBAS, environ))[1] == "1"
    for file in files:  # cut short by a crash
        file.write_bytes(file.read_bytes()[:1])
        assert finish(start(USE_NUMBAS, environ))[1] == "0"


@pytest.mark.parametrize(
    ("variable", "parent"), [("XDG_CACHE_HOME", "xdg"), ("NUMBA_CACHE_DIR", "chosen")]
)
def test_variables_choose(tmp_path: Path, variable: str, parent: str) -> None:
    environ = {"HOME": str(tmp_path), variable: str(tmp_path / parent)}
    (where,) = finish(start(LOOK, environ))
    assert Path(where).parent == tmp_path / parent / "moeconv"


def test_falls_back_to_the_temporary_directory(tmp_path: Path) -> None:
    """A file stands where the cache should be: nobody, root included, can make it a directory."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    where = Path(finish(start(USE, {"HOME": str(tmp_path), **environ}))[0])
    assert where.parents[1] == tmp_path / "tmp"
    assert kept(where)
    assert where.stat().st_mode & 0o077 == 0


def test_users_without_a_home(tmp_path: Path) -> None:
    """Nothing is made where the command runs, in a directory named ~ least of all."""
    code = f"import os; os.path.expanduser = str; {LOOK}"  # as where no such user is known
    (where,) = finish(start(code, {"TMPDIR": str(tmp_path)}))
    assert Path(where).parent == tmp_path / f"moeconv-{os.getuid()}"


@pytest.mark.parametrize("inside", [True, False])
def test_others_directory_is_not_trusted(tmp_path: Path, inside: bool) -> None:
    """What others can write, or rename away, is code that they could run here."""
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    where = Path(finish(start(LOOK, environ))[0])
    (where if inside else where.parent).chmod(0o777)
    assert Path(finish(start(LOOK, environ))[0]).parent == tmp_path / f"moeconv-{os.getuid()}"
    (tmp_path / f"moeconv-{os.getuid()}").chmod(0o777)
    assert finish(start(USE, environ)) == ["None", "True"]
