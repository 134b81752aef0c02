"""A tiny state dict, and each container to put it in."""

from __future__ import annotations

import pytest

from support.checkpoints.containers import SAVES, Save, StateDict, tiny_state


@pytest.fixture(params=sorted(SAVES))
def save(request: pytest.FixtureRequest) -> Save:
    """One way to save a flat state dict; a test that takes it runs once per container."""
    return SAVES[request.param]


@pytest.fixture
def state() -> StateDict:
    """See `tiny_state`; it may be changed."""
    return tiny_state()
