"""Where the tests' data lie."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Return the folder of third-party data that ships with the tests."""
    return FIXTURES
