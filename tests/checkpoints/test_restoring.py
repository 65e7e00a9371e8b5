"""Putting what was saved back into models and optimizers, whole or trainable parts of them."""

import pytest
import torch
from torch import nn

import statedict_io as sio


def fresh(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, seed=1):
    torch.manual_seed(seed)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("model_key", "optimizer_key"),
    [("model", "optimizer"), ("model", "opt"), ("model_state_dict", "optimizer_state_dict"), ("state_dict", "optim")],
)
def test_the_usual_three_lines(tmp_path, backend, model_key, optimizer_key):
    model, optimizer = fresh()
    train(model, optimizer)
    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save({"step": 7, model_key: model.state_dict(), optimizer_key: optimizer.state_dict()}, step=7)
    other, other_optimizer = fresh(seed=5)
    assert ckpts.restore(model=other, optimizer=other_optimizer, backend=backend) == 7
    assert equal(other.state_dict(), model.state_dict())
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert equal(other.state_dict(), model.state_dict())


def test_nothing_is_changed_where_a_part_is_missing(tmp_path):
    model, optimizer = fresh()
    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save({"model": model.state_dict()}, step=1)
    ckpts.save([1, 2], step=2)
    other, _ = fresh(seed=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(sio.StateDictIOError, match=r"no 'optimizer' to restore; its keys are 'model'"):
        ckpts.restore(model=other, optimizer=optimizer, step=1)
    with pytest.raises(sio.StateDictIOError, match="a list, not a dict"):
        ckpts.restore(model=other)
    with pytest.raises(TypeError, match="load_state_dict"):
        ckpts.restore(model={})
    assert equal(other.state_dict(), before)


def test_a_step_of_ones_own_choice(tmp_path):
    ckpts = sio.CheckpointDirectory(tmp_path)
    for step in (1, 2, 3):
        ckpts.save({"step": step}, step)
    assert ckpts.restore(step=2) == 2
    with pytest.raises(FileNotFoundError, match="step-00000009"):
        ckpts.restore(step=9)
    with open(tmp_path / "step-00000002.pt", "r+b") as file:
        file.truncate(100)
    with pytest.raises(sio.CorruptCheckpointError):
        ckpts.restore(step=2)


def test_values_that_need_trust(tmp_path):
    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save({"model": {"x": 1}, "path": tmp_path}, 1)
    import pickle

    with pytest.raises(pickle.UnpicklingError):
        ckpts.restore()
    assert ckpts.restore(weights_only=False) == 1


def test_a_frozen_backbone_is_not_saved_and_not_missed(tmp_path, backend):
    model, _ = fresh()
    model[0].requires_grad_(False)
    saved = sio.trainable_state_dict(model)
    assert list(saved) == [name for name in model.state_dict() if not name.startswith("0.")]
    assert "1.running_mean" in saved and type(saved) is type(model.state_dict())
    assert saved._metadata == model.state_dict()._metadata
    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save({"model": saved}, 1, backend=backend)
    other, _ = fresh(seed=5)
    backbone = other[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        ckpts.restore(model=other)  # whose backbone is to be trained: it has to come from somewhere
    other[0].requires_grad_(False)
    assert ckpts.restore(model=other) == 1
    assert torch.equal(other[0].weight, backbone) and torch.equal(other[2].weight, model[2].weight)
    ckpts.save({"model": {**saved, "3.weight": torch.ones(1)}}, 2)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*3\.weight"):
        ckpts.restore(model=other)


def test_the_backbone_takes_no_room(tmp_path):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))
    model[0].requires_grad_(False)
    ckpts = sio.CheckpointDirectory(tmp_path)
    ckpts.save({"model": sio.trainable_state_dict(model)}, 1)
    assert (tmp_path / "step-00000001.pt").stat().st_size < 20_000


def test_frozen_parameters_under_several_names():
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2), nn.Linear(2, 2)
    model.b.weight = model.a.weight
    model.a.weight.requires_grad_(False)
    assert list(sio.trainable_state_dict(model)) == ["a.bias", "b.bias"]
