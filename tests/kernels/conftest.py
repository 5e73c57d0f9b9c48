"""The side whose kernels a test runs: tests that take it hold the CPU's and the GPU's alike."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.kernels.oracle import Side


@pytest.fixture(scope="session", params=["cpu", "gpu"])
def side(request: pytest.FixtureRequest) -> Side:
    """Return how kernels are run and compared on the CPU or a GPU (without one, interpreted)."""
    if request.param == "gpu":
        pytest.importorskip("triton")
    name = {"cpu": "oracle", "gpu": "gpu_oracle"}[request.param]
    found: Side = import_module(f"tests.kernels.{name}").SIDE
    return found
