"""``FastCheckpointIO`` as Lightning calls it; real runs are in test_examples.py."""

import os
import pathlib
import pickle
import subprocess
import sys
import time

import pytest
import torch
from conftest import require_package
from oracle import assert_same_bytes

import statedict_io as sio

MIB = 1 << 20
SLOW = {"max_bytes_per_second": 8 * MIB}  # half a second for checkpoint()


@pytest.fixture(scope="module")
def FastCheckpointIO():
    require_package("lightning")
    from statedict_io.integrations.lightning import FastCheckpointIO

    return FastCheckpointIO


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def asynchronous(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_in_flight():
    yield
    sio.wait_all()


def checkpoint(step=1, nbytes=4 * MIB):
    generator = torch.Generator().manual_seed(step)
    w = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, generator=generator)
    return {"state_dict": {"w": w}, "global_step": step, "hyper_parameters": {"lr": 0.1}}


def test_writes_what_torch_save_writes_and_loads_it(FastCheckpointIO, tmp_path, asynchronous, backend):
    io = FastCheckpointIO(asynchronous=asynchronous, backend=backend)
    state = checkpoint()
    before = state["state_dict"]["w"].clone()
    (tmp_path / "ref").mkdir()
    torch.save(state, tmp_path / "ref" / "a.ckpt")
    path = tmp_path / "made" / "on the way" / "a.ckpt"
    io.save_checkpoint(state, path)
    if asynchronous:
        state["state_dict"]["w"].zero_()  # as training goes on
    loaded = io.load_checkpoint(str(path))
    assert torch.equal(loaded["state_dict"]["w"], before) and loaded["hyper_parameters"] == {"lr": 0.1}
    assert loaded["state_dict"]["w"].device.type == "cpu"
    io.teardown()
    assert_same_bytes(tmp_path / "ref" / "a.ckpt", path)
    io.save_checkpoint(checkpoint(2), path)  # a second fit()
    io.teardown()
    assert io.load_checkpoint(path)["global_step"] == 2
    io.remove_checkpoint(path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*a\.ckpt"):
        io.load_checkpoint(path)


def test_loads_what_lightning_saved_and_the_other_way(FastCheckpointIO, tmp_path, asynchronous):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    ours, theirs = FastCheckpointIO(asynchronous=asynchronous), TorchCheckpointIO()
    theirs.save_checkpoint(checkpoint(1), tmp_path / "theirs.ckpt")
    ours.save_checkpoint(checkpoint(1), tmp_path / "ours.ckpt")
    ours.teardown()
    w = checkpoint(1)["state_dict"]["w"]
    assert torch.equal(ours.load_checkpoint(tmp_path / "theirs.ckpt")["state_dict"]["w"], w)
    assert torch.equal(theirs.load_checkpoint(tmp_path / "ours.ckpt")["state_dict"]["w"], w)


def test_weights_only_is_the_boundary_unless_it_is_given_up(FastCheckpointIO, tmp_path):
    io = FastCheckpointIO()
    io.save_checkpoint({"path": pathlib.PurePosixPath("a"), "step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        io.load_checkpoint(tmp_path / "a.ckpt")
    assert io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["path"] == pathlib.PurePosixPath("a")


def test_teardown_waits_for_saves_in_flight(FastCheckpointIO, tmp_path):
    io = FastCheckpointIO(asynchronous=True, **SLOW)
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    io.teardown()
    assert torch.load(tmp_path / "a.ckpt")["global_step"] == 1
    pickle.dumps(io)  # as strategies that spawn processes do, between calls of fit()


def test_an_older_checkpoint_stays_until_the_newer_one_is_there(FastCheckpointIO, tmp_path):
    io = FastCheckpointIO(asynchronous=True, **SLOW)
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    torch.save(checkpoint(0), old)
    io.save_checkpoint(checkpoint(1), new)
    io.remove_checkpoint(old)
    looks = 0
    while True:
        is_there = old.exists()
        if new.exists():
            break
        assert is_there
        looks += 1
        time.sleep(0.01)
    assert looks > 0
    io.teardown()
    assert os.listdir(tmp_path) == ["new.ckpt"]


def test_what_is_saved_again_after_its_removal_stays(FastCheckpointIO, tmp_path):
    io = FastCheckpointIO(asynchronous=True, **SLOW)
    last = tmp_path / "last.ckpt"
    torch.save(checkpoint(0), last)
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    io.remove_checkpoint(last)
    io.save_checkpoint(checkpoint(2), last)
    io.teardown()
    assert torch.load(last)["global_step"] == 2


class FullDisk:
    """Saves fail while it is full."""

    def __init__(self, monkeypatch):
        self.full = False
        fsync = os.fsync

        def maybe(descriptor):
            if self.full:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", maybe)


@pytest.mark.parametrize("has_ended", [True, False])
def test_an_older_checkpoint_stays_for_good_where_the_newer_one_failed(
    FastCheckpointIO, tmp_path, monkeypatch, has_ended
):
    disk = FullDisk(monkeypatch)
    io = FastCheckpointIO(asynchronous=True, **({} if has_ended else SLOW))
    torch.save(checkpoint(0), tmp_path / "old.ckpt")
    disk.full = True
    io.save_checkpoint(checkpoint(1), tmp_path / "new.ckpt")
    if has_ended:
        while not io._saves[0].done():
            time.sleep(0.001)
    io.remove_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(OSError) as raised:
        io.teardown()
    assert raised.value.errno == 28 and raised.value.filename == str(tmp_path / "new.ckpt")
    assert os.listdir(tmp_path) == ["old.ckpt"]
    io.teardown()  # the error was raised once


def test_an_error_is_raised_by_the_next_save_to_whatever_path(FastCheckpointIO, tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    io = FastCheckpointIO(asynchronous=True)
    disk.full = True
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    while not io._saves[0].done():
        time.sleep(0.001)
    disk.full = False
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.ckpt'"):
        io.save_checkpoint(checkpoint(2), tmp_path / "b.ckpt")
    assert os.listdir(tmp_path) == []
    io.save_checkpoint(checkpoint(3), tmp_path / "c.ckpt")
    io.teardown()
    assert os.listdir(tmp_path) == ["c.ckpt"]


def test_an_error_of_removing_is_raised(FastCheckpointIO, tmp_path, monkeypatch):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    def refuse(self, path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", refuse)
    io = FastCheckpointIO(asynchronous=True, **SLOW)
    with pytest.raises(PermissionError):
        io.remove_checkpoint(tmp_path / "a.ckpt")
    io.save_checkpoint(checkpoint(1), tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(PermissionError):
        io.teardown()


def test_options_are_those_of_save_and_save_async(FastCheckpointIO, tmp_path):
    with pytest.raises(TypeError, match="max_in_flight"):
        FastCheckpointIO(max_in_flight=1)
    with pytest.raises(TypeError, match="speed"):
        FastCheckpointIO(asynchronous=True, speed=1)
    progress = []
    io = FastCheckpointIO(durable=False, progress=lambda done, total: progress.append((done, total)))
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert progress[-1][0] == progress[-1][1] > 4 * MIB
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(checkpoint(), tmp_path / "b.ckpt", storage_options={"a": 1})


def test_paths_with_a_scheme_are_lightnings(FastCheckpointIO, asynchronous):
    import fsspec

    io, url = FastCheckpointIO(asynchronous=asynchronous), "memory://lightning-test/a.ckpt"
    io.save_checkpoint(checkpoint(5), url)
    assert fsspec.filesystem("memory").exists("/lightning-test/a.ckpt")
    assert io.load_checkpoint(url)["global_step"] == 5
    io.remove_checkpoint(url)
    assert not fsspec.filesystem("memory").exists("/lightning-test/a.ckpt")


def test_serves_both_packages(FastCheckpointIO, tmp_path, asynchronous):
    """``pytorch_lightning`` has classes of its own; its Trainer takes no others."""
    require_package("pytorch_lightning")
    import lightning.fabric.plugins
    import lightning_fabric.plugins
    import pytorch_lightning
    from pytorch_lightning.demos.boring_classes import BoringModel

    assert lightning.fabric.plugins.CheckpointIO is not lightning_fabric.plugins.CheckpointIO
    assert issubclass(FastCheckpointIO, lightning.fabric.plugins.CheckpointIO)
    assert issubclass(FastCheckpointIO, lightning_fabric.plugins.CheckpointIO)
    io = FastCheckpointIO(asynchronous=asynchronous)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch_lightning.Trainer(
        plugins=[io], default_root_dir=tmp_path, max_epochs=2, limit_train_batches=2, accelerator="cpu", **quiet
    )
    assert trainer.strategy.checkpoint_io is io
    model = BoringModel()
    trainer.fit(model)
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")
    resumed = BoringModel()
    trainer = pytorch_lightning.Trainer(
        plugins=[io], default_root_dir=tmp_path, max_epochs=2, limit_train_batches=2, accelerator="cpu", **quiet
    )
    trainer.fit(resumed, ckpt_path=saved)  # already at its end
    assert trainer.global_step == 4
    assert torch.equal(resumed.layer.weight, model.layer.weight)


def test_fabric_takes_it(FastCheckpointIO, tmp_path):
    import lightning

    io = FastCheckpointIO(asynchronous=True)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[io])
    model = torch.nn.Linear(3, 2)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "step": 3})
    io.teardown()
    other = torch.nn.Linear(3, 2)
    state = {"model": other, "step": 0}
    fabric.load(tmp_path / "a.ckpt", state)
    assert state["step"] == 3 and torch.equal(other.weight, model.weight)


def test_lightnings_own_asynchronous_wrapper_takes_it(FastCheckpointIO, tmp_path):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    io = AsyncCheckpointIO(FastCheckpointIO())
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    io.teardown()
    assert torch.load(tmp_path / "a.ckpt")["global_step"] == 1


def test_says_what_to_install():
    blocked = "import sys; sys.modules['lightning'] = sys.modules['lightning_fabric'] = None; "
    command = [sys.executable, "-c", f"{blocked}import statedict_io.integrations.lightning"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(sio.__file__).parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 1
    assert "ImportError" in ended.stderr and "pip install 'statedict-io[lightning]'" in ended.stderr


def test_a_checkpoint_directory_finds_the_newest_sound_one_of_model_checkpoint(FastCheckpointIO, tmp_path):
    """The row of docs/integrations.md."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = ModelCheckpoint(tmp_path, filename="{step:08d}", auto_insert_metric_name=False)
    for step in (10, 20, 30):
        path = callback.format_checkpoint_name({"step": torch.tensor(step), "epoch": torch.tensor(0)})
        FastCheckpointIO().save_checkpoint(checkpoint(step), path)
    os.truncate(path, 1000)
    ckpts = sio.CheckpointDirectory(tmp_path, pattern="{step:08d}.ckpt")
    with pytest.warns(sio.CheckpointDirectoryWarning, match=r"00000030\.ckpt"):
        found = ckpts.latest()
    assert found.step == 20 and found.path == str(tmp_path / "00000020.ckpt")
