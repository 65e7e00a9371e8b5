"""Files that are no checkpoints, targets that cannot be opened, wrong options: the error is one that torch raises, and
its message says which file or option it is and what is wrong with it."""

import errno
import io
import os
import pathlib
import pickle
import re

import numpy
import pytest
import torch
from corpus_case import filled
from oracle import names_in

import statedict_io as sio

pytestmark = pytest.mark.filterwarnings("ignore:'torch.load' received", "ignore:Detected pickle protocol")

STATE = {"w": filled(300), "p": torch.nn.Parameter(torch.ones(2))}
MIB = 1 << 20


def legacy():
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


#: what is said -> the file's content
JUNK = {
    "the file is empty": b"",
    r"its first bytes are b'x'": b"x",
    r"its first bytes are b'\x80'": b"\x80",
    "the file begins with zero bytes": bytes(10),
    "the file ends after 2 bytes": b"PK",
    r"its first bytes are b'hello world\n'": b"hello world\n",
    r"its first bytes are b'epoch,loss\n0,1.5'": b"epoch,loss\n0,1.5\n1,0.7\n",
    r"its first bytes are b'\xff\xfe\xfd\xfc": bytes(range(255, 0, -1)),
    "is JSON text": b'{"a": 1}',
    "in torch's legacy format, ends too early": legacy()[: len(legacy()) // 2],
    "is a plain pickle": b"\x80\x02",
}


def error_of(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def assert_said(error, path, what, like):
    """``error`` can be caught as ``like`` can, and is complete."""
    assert isinstance(error, type(like)) and isinstance(error, sio.StateDictIOError)
    assert str(error).startswith(f"{path}: ") and what in str(error)
    assert "weights_only" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, type(like)) and str(again) == str(error)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("what", JUNK)
def test_a_file_that_is_no_checkpoint(what, weights_only, backend, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(JUNK[what])
    like = error_of(lambda: torch.load(path, weights_only=weights_only))
    error = error_of(lambda: sio.load(path, weights_only=weights_only, backend=backend))
    assert_said(error, path, what, like)
    assert error.__suppress_context__  # torch's advice, which would be shown with it
    if "legacy" not in what:
        assert what in str(error_of(lambda: sio.open_checkpoint(path, backend=backend)))


@pytest.mark.parametrize("what", JUNK)
def test_the_same_at_a_url(what, backend):
    fsspec = pytest.importorskip("fsspec")
    url = "memory://what_is_wrong/model.pt"
    with fsspec.open(url, "wb") as file:
        file.write(JUNK[what])
    like = error_of(lambda: torch.load(io.BytesIO(JUNK[what])))
    assert_said(error_of(lambda: sio.load(url, backend=backend)), url, what, like)


def test_a_legacy_file_that_is_cut_anywhere(backend, tmp_path):
    path, whole = tmp_path / "model.pt", legacy()
    path.write_bytes(whole)
    assert torch.equal(sio.load(path, backend=backend)["w"], STATE["w"])
    for nbytes in range(32, len(whole), 3):
        path.write_bytes(whole[:nbytes])
        like = error_of(lambda: torch.load(path))
        assert_said(error_of(lambda: sio.load(path, backend=backend)), path, "ends too early", like)


class Foreign:
    pass


def test_what_a_whole_legacy_file_is_refused_for_stays_torchs_to_say(backend, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(Foreign(), path, _use_new_zipfile_serialization=False)
    error = error_of(lambda: sio.load(path, backend=backend))
    assert type(error) is pickle.UnpicklingError and "Foreign" in str(error)
    assert isinstance(sio.load(path, weights_only=False, backend=backend), Foreign)


class OwnFormat:
    """A ``pickle_module`` whose files begin as it likes."""

    Unpickler = pickle.Unpickler

    @staticmethod
    def load(file, **_):
        raise EOFError(f"no {file.read(4)!r} is known")


def test_a_module_of_the_users_speaks_for_itself(backend, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"OWN1" * 100)
    for load in (torch.load, lambda *args, **options: sio.load(*args, backend=backend, **options)):
        error = error_of(lambda load=load: load(path, None, OwnFormat, weights_only=False))
        assert type(error) is EOFError and "is known" in str(error)


def test_an_object_of_the_users_keeps_torchs_error(backend):
    error = error_of(lambda: sio.load(io.BytesIO(), backend=backend))
    assert type(error) is EOFError


def test_a_directory_is_named_by_every_reader(backend, tmp_path):
    for read in (sio.load, sio.open_checkpoint, sio.verify):
        error = error_of(lambda read=read: read(tmp_path, backend=backend))
        assert isinstance(error, IsADirectoryError) and error.filename == str(tmp_path)


@pytest.mark.parametrize("options", [{}, {"atomic": False}])
@pytest.mark.parametrize("path", ["adir.pt", "missing/model.pt", "file.pt/model.pt", "x" * 300 + ".pt"])
def test_a_target_that_cannot_be_opened_is_named_in_the_text(path, options, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("adir.pt").mkdir()
    pathlib.Path("file.pt").write_bytes(b"old")
    like = error_of(lambda: torch.save(STATE, path))
    error = error_of(lambda: sio.save(STATE, path, backend=backend, **options))
    assert isinstance(error, type(like)) and isinstance(error, OSError) and error.filename == path
    assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize("options", [{}, {"atomic": False}])
def test_a_read_only_file_is_named_in_the_text(options, backend, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    opened = os.open

    def refusing(name, flags, *args, **rest):  # also where the tests run as root, whom no mode stops
        if os.path.basename(os.fspath(name)) == path.name and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return opened(name, flags, *args, **rest)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    error = error_of(lambda: sio.save(STATE, path, backend=backend, **options))
    assert isinstance(error, PermissionError) and isinstance(error, RuntimeError)
    assert str(error).startswith(f"{path}: ") and str(error).endswith("Permission denied")
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["model.pt"]


FLAGS = ("no", None, [], 0.5)
NUMBERS = ("8GiB", [8], {})
TEXTS = (3, None, ["native"])
BYTES_OR_NONE = dict.fromkeys(("max_snapshot_nbytes", "max_device_snapshot_nbytes", "device_margin_nbytes"), NUMBERS)
OF_PATCH = {"durable": FLAGS, "atomic": FLAGS, "backend": TEXTS, "progress": ("yes", 3)}
OF_SAVE = {**OF_PATCH, "digest": (3, True, ["sha256"])}
#: call -> its options -> values of a wrong type
OPTIONS = {
    "save": OF_SAVE,
    "fastsave": OF_SAVE,
    "save_async": {
        **OF_SAVE,
        **BYTES_OR_NONE,
        "max_in_flight": (*NUMBERS, None),
        "max_bytes_per_second": NUMBERS,
        "when_full": TEXTS,
        "wait_snapshot": FLAGS,
    },
    "save_safetensors": {**OF_SAVE, "max_shard_nbytes": NUMBERS},
    "patch_torch": OF_PATCH,
    "load": {"verify": FLAGS, "backend": TEXTS, "progress": ("yes", 3)},
    "open_checkpoint": {"weights_only": FLAGS, "backend": TEXTS},
    "verify": {"backend": TEXTS, "progress": ("yes", 3)},
}


def call_with(name, path, options):
    if name == "patch_torch":
        sio.patch_torch(**options).undo()
    elif "save" in name:
        getattr(sio, name)(STATE, path, **options)
    else:
        getattr(sio, name)(path, **options)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name]])
def test_an_option_of_a_wrong_type_is_named(name, option, backend, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(STATE, path)
    before = path.read_bytes()
    for value in OPTIONS[name][option]:
        with pytest.raises(TypeError, match=rf"^{option} must be .*, got {re.escape(repr(value))}$"):
            call_with(name, path, {"backend": backend, option: value})
    sio.wait_all(60)
    assert path.read_bytes() == before and names_in(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_call_is_in_the_table(name):
    import inspect

    call = sio.save if name == "fastsave" else getattr(sio, name)
    parameters = inspect.signature(call).parameters.values()
    own = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} - {"mmap"}
    of_torch = {"weights_only"} if name == "load" else set()  # any truth does there, as in torch.load
    assert own - of_torch == OPTIONS[name].keys()


def test_flags_and_numbers_may_be_numpys(backend, tmp_path):
    path = tmp_path / "model.pt"
    sio.save(STATE, path, durable=numpy.bool_(False), atomic=torch.tensor(True), backend=backend)
    for nbytes in (8e9, numpy.int64(MIB), float("inf"), None):
        pending = sio.save_async(
            STATE, path, durable=0, max_snapshot_nbytes=nbytes, max_in_flight=numpy.int32(2), backend=backend
        )
        pending.result(60)
    assert torch.equal(sio.load(path, verify=numpy.True_, backend=backend)["w"], STATE["w"])


@pytest.mark.parametrize("weights_only", [True, False])
def test_an_argument_that_load_does_not_have_is_named(weights_only, backend, tmp_path):
    """In torch's words: the unpickler takes what is not load's own."""
    path = tmp_path / "model.pt"
    torch.save(STATE, path)
    like = error_of(lambda: torch.load(path, durable=True, weights_only=weights_only))
    error = error_of(lambda: sio.load(path, durable=True, weights_only=weights_only, backend=backend))
    assert type(error) is TypeError and "'durable'" in str(error) and str(error) == str(like)
