"""The error tree is public: what catches what, and what messages name."""

import errno
import pickle

import pytest

import statedict_io as sio
from statedict_io.errors import naming
from statedict_io.untrusted.limits import listed


def test_the_librarys_own_errors_have_one_base():
    assert issubclass(sio.CorruptCheckpointError, sio.StateDictIOError)
    assert issubclass(sio.NativeUnavailableError, sio.StateDictIOError)
    assert issubclass(sio.StateDictIOError, Exception)


def test_the_base_is_no_system_or_argument_error():
    assert not issubclass(sio.StateDictIOError, OSError | RuntimeError | ValueError | TypeError)


def test_siblings_do_not_catch_each_other():
    assert not issubclass(sio.CorruptCheckpointError, sio.NativeUnavailableError)
    assert not issubclass(sio.NativeUnavailableError, sio.CorruptCheckpointError)


@pytest.mark.parametrize("name", ["StateDictIOError", "CorruptCheckpointError", "NativeUnavailableError"])
def test_errors_cross_process_boundaries(name):
    error = getattr(sio, name)("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "what happened"


@pytest.mark.parametrize("path", ["missing/model.pt", "sub"])
def test_a_refused_path_crosses_process_boundaries(path, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(OSError) as caught:
        sio.save({}, path, backend=backend)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, OSError) and isinstance(again, RuntimeError)
    assert (again.errno, again.filename, str(again)) == (caught.value.errno, path, str(caught.value))


def test_a_system_error_gets_the_name_that_it_lacks():
    for given, expected in (
        ((errno.EIO, "failed"), "a.pt"),
        ((errno.EIO, "failed", "b.pt"), "b.pt"),
        (("no number",), None),
    ):
        with pytest.raises(OSError) as raised, naming("a.pt"):
            raise OSError(*given)
        assert raised.value.filename == expected


def test_names_in_a_message():
    assert listed(["a"]) == "a"
    assert listed(["", *"bcdefgh"]) == "the object itself, b, c, d, e, f, g, h"
    assert listed([*"abcdefghijk"], str.upper) == "A, B, C, D, E, F, G, H and 3 more"
