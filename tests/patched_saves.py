"""What the tests of ``patch_torch`` save, and how they see by whom."""

import pytest
import torch

ORIGINAL = torch.save


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    assert torch.save is ORIGINAL and torch.serialization.save is ORIGINAL


def sample_state():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(7, 5)
    return {"model": model.state_dict(), "w": torch.randn(100, 30, generator=generator), "step": 3}


def is_replaced_by(save, state, path):
    """Whether ``save`` puts a new file in the place of an old one; the original writes into the old one."""
    path.write_bytes(b"old")
    with open(path, "rb"):  # holds the inode, which could be used again otherwise
        before = path.stat().st_ino
        save(state, path)
        assert torch.load(path, weights_only=False)["step"] == state["step"]
        return path.stat().st_ino != before
