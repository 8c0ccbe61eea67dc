"""How far the explorer goes: MILLRACE_EXPLORER_STATES raises it for a long run."""

import os

import pytest


@pytest.fixture(scope="session")
def explorer_limit() -> int:
    """States to expand per scene."""
    return int(os.environ.get("MILLRACE_EXPLORER_STATES", "1000"))
