"""Where the tests' data lie, and how GPU kernels run where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.kernels import interpreter

# Before anything imports a Triton kernel: without a GPU its interpreter runs them, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.patch_once()

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Return the folder of third-party data that ships with the tests."""
    return FIXTURES
