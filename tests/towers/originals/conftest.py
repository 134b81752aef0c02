"""Containers for the state of an original model."""

from __future__ import annotations

import pytest

from support.checkpoints.containers import NESTED_SAVES, Save


@pytest.fixture(params=sorted(NESTED_SAVES))
def save(request: pytest.FixtureRequest) -> Save:
    """One way to save a state dict; a test that takes it runs once per container."""
    return NESTED_SAVES[request.param]
