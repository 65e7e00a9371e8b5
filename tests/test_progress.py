"""What a progress callback raises is the caller's: it is never taken for the system's answer about a file."""

import errno
import time

import pytest
import torch
from oracle import names_in

import statedict_io as sio
from statedict_io.conversion import convert

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def state():
    return {str(i): torch.rand(1 << 18, generator=torch.Generator().manual_seed(i)) for i in range(12)}


@pytest.fixture
def saved(tmp_path, state):
    """A file of each format in a directory, whose names are all that may be there after a failed call."""
    torch.save(state, tmp_path / "old.pt")
    torch.save({"other": 1}, tmp_path / "model.pt")
    convert(str(tmp_path / "old.pt"), str(tmp_path / "old.safetensors"))
    return tmp_path


def dcp_save(state, path, **options):
    import torch.distributed.checkpoint as dcp

    from statedict_io.dcp import SingleFileWriter

    try:
        dcp.save(state, storage_writer=SingleFileWriter(path, **options), no_dist=True)
    except dcp.api.CheckpointException as e:  # what a rank raised, by rank
        ((_, (error, _)),) = e.failures.items()
        raise error from None


CALLS = {
    "save": lambda state, at, options: sio.save(state, at / "model.pt", **options),
    "save, not durable": lambda state, at, options: sio.save(state, at / "model.pt", durable=False, **options),
    "save_async": lambda state, at, options: sio.save_async(state, at / "model.pt", **options).result(),
    "dcp.save": lambda state, at, options: dcp_save(state, at / "model.pt", **options),
    "load": lambda state, at, options: sio.load(at / "old.pt", **options),
    "load, verify": lambda state, at, options: sio.load(at / "old.pt", verify=True, **options),
    "verify": lambda state, at, options: sio.verify(at / "old.pt", **options),
}


# Broken pipes are common; the others are answers that ask for another way to write, where a file system gives them.
@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL, errno.ESPIPE, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("name", CALLS)
def test_an_oserror_of_the_callback_comes_back_as_it_was_raised(name, number, backend, saved, state):
    before = {entry: (saved / entry).read_bytes() for entry in names_in(saved)}
    raised = []

    def progress(bytes_done, bytes_total):
        raised.append(OSError(number, "of the callback"))
        raise raised[-1]

    with pytest.raises(OSError, match="of the callback") as caught:
        CALLS[name](state, saved, {"backend": backend, "progress": progress})
    assert caught.value is raised[0] and len(raised) == 1
    assert caught.value.filename is None
    deadline = time.monotonic() + 60
    while names_in(saved) != [*before] and time.monotonic() < deadline:
        time.sleep(0.01)  # a writer of dcp.save removes its temporary when it finds that the call is over
    assert {entry: (saved / entry).read_bytes() for entry in names_in(saved)} == before


@pytest.mark.parametrize(("source", "destination"), [("old.pt", "new.safetensors"), ("old.safetensors", "new.pt")])
def test_converting(source, destination, saved):
    error = OSError(errno.EINVAL, "of the callback", "its own file")
    before = names_in(saved)

    def progress(bytes_done, bytes_total):
        raise error

    with pytest.raises(OSError, match="of the callback") as caught:
        convert(str(saved / source), str(saved / destination), progress=progress)
    assert caught.value is error and error.filename == "its own file"
    assert names_in(saved) == before


def test_errors_of_the_file_still_name_it(backend, tmp_path):
    for call in (sio.load, sio.verify):
        with pytest.raises(FileNotFoundError) as caught:
            call(tmp_path / "missing.pt", backend=backend, progress=print)
        assert caught.value.filename == str(tmp_path / "missing.pt")


def test_a_bar_is_shown_once_there_is_something_to_report(backend, saved, capsys):
    pytest.importorskip("tqdm")
    with pytest.raises(FileNotFoundError):
        sio.load(saved / "missing.pt", backend=backend, progress=True)
    assert capsys.readouterr().err == ""
    sio.load(saved / "old.pt", backend=backend, progress=True)
    assert "load" in capsys.readouterr().err
