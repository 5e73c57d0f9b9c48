"""import moeconv: cheap, and every public name there on first use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moeconv
from tests.cli.runs import run_python


def test_importing_imports_nothing() -> None:
    code = (
        "import sys, moeconv; "
        "print(sorted(name for name in sys.modules if name.startswith('moeconv') or "
        "name in ('numpy', 'numba', 'torch', 'typer')))"
    )
    assert run_python(["-c", code]).out == "['moeconv']\n"


@pytest.mark.parametrize("name", moeconv.__all__)
def test_public_names(name: str) -> None:
    assert getattr(moeconv, name) is not None
    assert name in dir(moeconv)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'fly'"):
        moeconv.fly  # noqa: B018


@pytest.mark.parametrize(
    "before",
    [
        "",
        "from moeconv.plan import Plan",
        "import moeconv.plan, moeconv.convert, moeconv.verify",
        "moeconv.inspect",
        "from moeconv.convert import convert_plan",
    ],
)
def test_functions_are_not_hidden_by_modules_of_their_name(before: str) -> None:
    code = (
        f"import moeconv\n{before}\n"
        "print(callable(moeconv.plan), callable(moeconv.convert), callable(moeconv.verify))\n"
        "from moeconv import plan\nprint(callable(plan))"
    )
    assert run_python(["-c", code]).out == "True True True\nTrue\n"


def test_the_least_triton_that_is_installed_is_the_least_that_is_used() -> None:
    from moeconv.kernels.gpu.base import LEAST_TRITON

    text = (Path(moeconv.__file__).parents[1] / "pyproject.toml").read_text()
    assert re.findall(r'"triton>=([\d.]+);', text) == [".".join(map(str, LEAST_TRITON))]
