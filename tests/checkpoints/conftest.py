import pytest
import torch
from faults.conftest import preload  # noqa: F401


@pytest.fixture
def state():
    """state(step): a small state that tells its step."""

    def make(step, nbytes=1000):
        return {"step": step, "weight": torch.full((nbytes,), step % 251, dtype=torch.uint8)}

    return make
