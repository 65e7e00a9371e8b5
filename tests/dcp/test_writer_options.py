"""Where SingleFileWriter may write, and what it says of values that few can read back."""

import os
import pathlib
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from statedict_io.dcp import SingleFileReader, SingleFileWriter

from .ranks import all_well, run_ranks


def state():
    return {"w": torch.arange(4.0), "step": 3}


def save(path, value=None, *, checkpoint_id=None, **options):
    writer = SingleFileWriter(path, **options)
    dcp.save(value or state(), storage_writer=writer, checkpoint_id=checkpoint_id, no_dist=True)


def error_of(call, *arguments, **options):
    with pytest.raises(CheckpointException) as raised:
        call(*arguments, **options)
    ((error, _),) = raised.value.failures.values()
    return error


@pytest.mark.parametrize("given", [str, pathlib.Path.as_uri])
def test_a_file_that_is_there_stays_with_overwrite_false(tmp_path, backend, given):
    if given is not str:
        pytest.importorskip("fsspec")
    path = tmp_path / "model.pt"
    save(given(path), backend=backend, overwrite=False)
    before = path.read_bytes()
    error = error_of(save, given(path), {"w": torch.zeros(9)}, backend=backend, overwrite=False)
    assert isinstance(error, FileExistsError) and error.filename == given(path) and "overwrite=False" in str(error)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]
    save(path, {"w": torch.zeros(9)}, backend=backend)
    assert torch.load(path)["w"].shape == (9,)


def save_in_ranks(rank, world_size, path, late):
    writer = SingleFileWriter(path, overwrite=False)
    if late:
        prepare = writer.prepare_global_plan

        def somebody_is_quicker(plans):
            found = prepare(plans)
            torch.save("theirs", path)
            return found

        writer.prepare_global_plan = somebody_is_quicker
    try:
        dcp.save(state(), storage_writer=writer)
    except CheckpointException as e:
        return [type(error).__name__ for error, _ in e.failures.values()]


@pytest.mark.parametrize("late", [False, True])
def test_all_ranks_raise_with_overwrite_false(tmp_path, late):
    path = tmp_path / "model.pt"
    if not late:
        torch.save("theirs", path)
    for errors in all_well(run_ranks(2, save_in_ranks, str(path), late)):
        assert errors == ["FileExistsError"]
    assert torch.load(path) == "theirs" and os.listdir(tmp_path) == ["model.pt"]


def test_options_of_the_stock_writer(tmp_path, backend):
    save(tmp_path / "model.pt", backend=backend, thread_count=8, overwrite=True)
    assert torch.load(tmp_path / "model.pt")["step"] == 3


def test_missing_parents_are_made(tmp_path, backend):
    save(tmp_path / "not this one", backend=backend, checkpoint_id=tmp_path / "runs" / "7" / "model.pt")
    assert torch.load(tmp_path / "runs" / "7" / "model.pt")["step"] == 3
    assert os.listdir(tmp_path) == ["runs"]
    save(os.path.relpath(tmp_path / "runs" / "8" / "model.pt"), backend=backend)
    assert torch.load(tmp_path / "runs" / "8" / "model.pt")["step"] == 3


def test_missing_parents_in_a_url_of_this_machine(tmp_path, backend):
    pytest.importorskip("fsspec")
    save((tmp_path / "runs" / "9" / "model.pt").as_uri(), backend=backend)
    assert torch.load(tmp_path / "runs" / "9" / "model.pt")["step"] == 3


def test_a_directory_is_named_as_one(tmp_path, backend):
    (tmp_path / "step7").mkdir()
    error = error_of(save, "x", backend=backend, checkpoint_id=tmp_path / "step7")
    assert isinstance(error, IsADirectoryError) and error.filename == str(tmp_path / "step7")
    assert "such as model.pt in that directory" in str(error)
    assert isinstance(error_of(save, f"{tmp_path}/new/", backend=backend), IsADirectoryError)
    with pytest.raises(IsADirectoryError, match=r"(?s)FileSystemReader.*step7"):
        SingleFileReader(tmp_path / "step7", backend=backend).read_metadata()
    assert os.listdir(tmp_path / "step7") == [] and os.listdir(tmp_path) == ["step7"] and not os.path.exists("x")


def test_values_that_are_refused_later_are_named_once(tmp_path, backend):
    numpy = pytest.importorskip("numpy")
    value = {**state(), "rng": numpy.random.RandomState(1), "more": {"dtype": (numpy.random.RandomState(2), 1)}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path / "model.pt", value, backend=backend)
        save(tmp_path / "plain.pt", backend=backend)
    about_it = [str(each.message) for each in caught if "refuse" in str(each.message)]
    assert len(about_it) == 1
    for part in ("model.pt", "'rng' (needs numpy.", "'more.dtype'", "SingleFileReader(path, weights_only=False)"):
        assert part in about_it[0]
    assert "'w'" not in about_it[0] and "'step'" not in about_it[0]
    # Who makes errors of warnings has his old file.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*restricted unpickler will refuse")
        assert isinstance(error_of(save, tmp_path / "plain.pt", value, backend=backend), UserWarning)
    assert "rng" not in torch.load(tmp_path / "plain.pt") and sorted(os.listdir(tmp_path)) == ["model.pt", "plain.pt"]
