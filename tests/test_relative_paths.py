"""A relative path means what it meant at the call, wherever the working directory lies: torch.save opens it by itself.

Each place is entered in a forked child, as somebody else: for root every directory can be searched.
"""

import contextlib
import faulthandler
import os
import pathlib
import pickle
import shutil
import subprocess
import tempfile
import threading
import traceback

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import require_native
from faults.ways import OPTIONS, options_for

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader, SingleFileWriter

NOBODY = 65534
OBJ = {"weight": torch.arange(1000, dtype=torch.int32), "step": 3}
LARGE = {"weight": torch.arange(2 << 20, dtype=torch.int32), "step": 3}
needs_another_user = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What a child that is somebody else could not import."""
    with tempfile.TemporaryDirectory() as directory:
        for each in ("native", "torch"):
            if each == "torch" or sio.backend_info().name == "native":
                use_everything(pathlib.Path(directory), each)


@pytest.fixture
def below():
    """A directory of NOBODY's below another that only root may search."""
    top = pathlib.Path(tempfile.mkdtemp())
    inner = top / "closed" / "inner"
    inner.mkdir(parents=True)
    os.chown(inner, NOBODY, NOBODY)
    top.chmod(0o755)
    yield inner
    shutil.rmtree(top)


def enter_unsearchable(below):
    os.chdir(below)
    below.parent.chmod(0o700)


def enter_too_long(below):
    """A path of more than PATH_MAX, 4096."""
    os.chdir(below)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    os.chown(".", NOBODY, NOBODY)


PLACES = {"unsearchable": enter_unsearchable, "too long": enter_too_long}


def in_child(enter, action):
    """Runs `action` in a child that is NOBODY, in the place that `enter` enters; fails with what it raised."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            faulthandler.dump_traceback_later(300, exit=True)
            torch.set_num_threads(1)  # the others that torch computes with are the parent's
            enter()
            os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
            action()
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(write_end, pickle.dumps(text[-8000:]))
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        text = pickle.load(pipe)
    os.waitpid(child, 0)
    assert text == ""


def save_async(obj, path, **options):
    sio.save_async(obj, path, **options).result(timeout=300)


def check(path, obj):
    assert torch.equal(torch.load(path)["weight"], obj["weight"])


def use_everything(directory, backend):
    """Each entry point that takes a path."""
    at = lambda name: os.path.join(directory, name)  # noqa: E731
    for obj in (OBJ, LARGE):
        sio.save(obj, at("model.pt"), backend=backend)
        check(at("model.pt"), obj)
        sio.save(obj, at("model.pt"), backend=backend, durable=False, atomic=False)
        check(at("model.pt"), obj)
        sio.fastsave(obj, at("fast.pt"), backend=backend)
        check(at("fast.pt"), obj)
        save_async(obj, at("async.pt"), backend=backend)
        check(at("async.pt"), obj)
        with sio.patch_torch(backend=backend):
            torch.save(obj, at("patched.pt"))
        check(at("patched.pt"), obj)
        assert torch.equal(sio.load(at("model.pt"), backend=backend, verify=True)["weight"], obj["weight"])
        assert torch.equal(sio.load(at("model.pt"), backend=backend, mmap=True)["weight"], obj["weight"])
        with sio.open_checkpoint(at("model.pt")) as checkpoint:
            assert torch.equal(checkpoint["weight"], obj["weight"])
        assert sio.verify(at("model.pt")).ok
        convert(at("model.pt"), at("model.safetensors"))
        convert(at("model.safetensors"), at("back.pt"))
        check(at("back.pt"), obj)
        state = {"weight": obj["weight"].clone()}
        dcp.save(state, storage_writer=SingleFileWriter(at("dcp.pt"), backend=backend), no_dist=True)
        check(at("dcp.pt"), obj)
        state["weight"].zero_()
        dcp.load(state, storage_reader=SingleFileReader(at("dcp.pt"), backend=backend), no_dist=True)
        assert torch.equal(state["weight"], obj["weight"])


@needs_another_user
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("directory", ["", "sub", "../" + "d" * 250, "link"])
def test_every_entry_point(directory, place, backend, below):
    if directory.startswith("..") and place == "unsearchable":
        directory = "sub/../sub"

    def use():
        os.mkdir("sub")
        os.symlink("sub", "link")
        torch.save(OBJ, os.path.join(directory, "by_torch.pt"))  # it can
        use_everything(directory, backend)
        found = sorted(os.listdir(directory or "."))
        assert [name for name in found if name.endswith("sdio-tmp")] == []

    in_child(lambda: PLACES[place](below), use)


@needs_another_user
@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_every_way_to_write(place, way, below):
    """Links too, whose bytes tell whether the archive's name is the given one."""
    if way == "native":
        require_native()

    def use():
        os.symlink("target.pt", "link.pt")
        with options_for(way) as options:
            torch_options = {key: value for key, value in options.items() if key != "backend"}
            for name, file in (("model.pt", "model.pt"), ("link.pt", "target.pt")):
                torch.save(OBJ, name, **torch_options)
                os.rename(file, "expected")
                for atomic in (True, False, True):
                    sio.save(OBJ, name, atomic=atomic, **options)
                    assert pathlib.Path(file).read_bytes() == pathlib.Path("expected").read_bytes(), (name, atomic)
        assert sorted(os.listdir(".")) == ["expected", "link.pt", "model.pt", "target.pt"]

    in_child(lambda: PLACES[place](below), use)


@contextlib.contextmanager
def entered(directory):
    """The working directory is `directory` in the block."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(directory)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "sub/model.pt", "link.pt", "fifo"])
def test_the_writing_thread_runs_after_chdir(name, atomic, backend, tmp_path):
    """The file belongs where the working directory was at the call."""
    for directory in ("here/sub", "there/sub"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "here" / "link.pt").symlink_to("sub/model.pt")
    os.mkfifo(tmp_path / "here" / "fifo")
    received = []
    fifo = tmp_path / "here" / "fifo"
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()), daemon=True)
    if name == "fifo":
        reader.start()
    with entered(tmp_path / "here"):
        for _ in range(1 if name == "fifo" else 2):  # the second one's thread begins when the first has ended
            pending = sio.save_async(LARGE, name, backend=backend, atomic=atomic, max_bytes_per_second=20 << 20)
        os.chdir(tmp_path / "there")
        if name == "model.pt":
            (tmp_path / "here").rename(tmp_path / "elsewhere")  # nor does its own name matter
        pending.result(timeout=300)
    here = tmp_path / ("elsewhere" if name == "model.pt" else "here")
    if name == "fifo":
        reader.join(60)
        fifo.unlink()
        fifo.write_bytes(received[0])
    assert torch.equal(torch.load(here / name)["weight"], LARGE["weight"])
    assert os.listdir(tmp_path / "there") == ["sub"] and os.listdir(tmp_path / "there" / "sub") == []


class Leaves:
    """Changes the working directory while it is pickled."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        os.chdir(self.directory)
        return str, ("left",)


@pytest.mark.parametrize("save", [sio.save, save_async])
def test_chdir_while_it_is_pickled(save, backend, tmp_path):
    for directory in ("here", "there"):
        (tmp_path / directory).mkdir()
    with entered(tmp_path / "here"):
        save({**OBJ, "leaves": Leaves(tmp_path / "there")}, "model.pt", backend=backend)
    assert torch.load(tmp_path / "here" / "model.pt", weights_only=False)["leaves"] == "left"
    assert os.listdir(tmp_path / "there") == []


@pytest.mark.parametrize("save", [sio.save, sio.fastsave, save_async])
@pytest.mark.parametrize("name", ["model.pt", "./model.pt", "sub/model.pt", "\u00e9.pt", "../model.pt", "../\u00e9.pt"])
def test_a_working_directory_that_was_removed(name, save, backend, tmp_path):
    """As torch.save: its errors; and what lies elsewhere can be reached."""
    (tmp_path / "gone").mkdir()
    with entered(tmp_path / "gone"):
        os.rmdir(tmp_path / "gone")
        try:
            torch.save(OBJ, name)
        except (OSError, RuntimeError) as e:
            with pytest.raises(type(e)) as caught:
                save(OBJ, name, backend=backend)
            assert isinstance(caught.value, FileNotFoundError) and caught.value.filename == name
            torchs_words = str(e).splitlines()[0]
            assert torchs_words.endswith(str(caught.value).removeprefix(f"{name}: "))
            assert os.listdir(tmp_path) == []
        else:
            expected = (tmp_path / name[3:]).read_bytes()
            save(OBJ, name, backend=backend)
            assert (tmp_path / name[3:]).read_bytes() == expected and os.listdir(tmp_path) == [name[3:]]


@pytest.mark.parametrize("absolute", [True, False])
def test_every_entry_point_from_a_working_directory_that_was_removed(absolute, backend, tmp_path):
    (tmp_path / "gone").mkdir()
    with entered(tmp_path / "gone"):
        os.rmdir(tmp_path / "gone")
        use_everything(tmp_path if absolute else "..", backend)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("sdio-tmp")]


@needs_another_user
def test_saves_through_different_names_of_a_directory_keep_their_order(backend, tmp_path):
    """Links, bind mounts and relative names lead to one file: the last call stands."""
    real, bound, link = tmp_path / "real", tmp_path / "bound", tmp_path / "link"
    real.mkdir(), bound.mkdir(), link.symlink_to("real")
    if subprocess.run(["mount", "--bind", real, bound], capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        with entered(real):
            paths = [real / "model.pt", bound / "model.pt", link / "model.pt", "model.pt", "../link/model.pt"]
            for last in paths:
                slow = [
                    sio.save_async({"weight": torch.full((1 << 20,), i)}, path, backend=backend,
                                   max_bytes_per_second=100 << 20, max_in_flight=20)
                    for i, path in enumerate(paths)
                ]  # fmt: skip
                assert len({save._save.file for save in slow}) == 1
                sio.save({"weight": torch.full((3,), 77)}, last, backend=backend)
                assert all(save.done() for save in slow)
                assert torch.equal(torch.load(real / "model.pt")["weight"], torch.full((3,), 77))
    finally:
        subprocess.run(["umount", str(bound)], check=True)


def test_descriptors_of_directories_are_given_back(backend, tmp_path):
    """Also after an error whose traceback is kept."""
    with entered(tmp_path):
        sio.save(OBJ, "model.pt", backend=backend)
        before, kept = len(os.listdir("/proc/self/fd")), []
        for obj, path in (({"f": lambda: 0}, "model.pt"), (OBJ, "."), (OBJ, "missing/model.pt")):
            for save in (sio.save, sio.save_async):
                try:
                    save(obj, path, backend=backend)
                except Exception as e:
                    kept.append(e)
        sio.save_async(OBJ, "model.pt", backend=backend).result()
        sio.save(OBJ, "model.pt", backend=backend, atomic=False)
        assert len(kept) == 6
        assert len(os.listdir("/proc/self/fd")) == before
