"""What a file or a directory says is not executed by convert, unless that is asked for."""

import collections
import dataclasses
import enum
import os
import pathlib
import pickle
import pickletools
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from corpus_case import filled
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.dcp import conversion
from statedict_io.pickles.protocol_2 import in_protocol_2
from statedict_io.pickles.restricted import unpickled
from statedict_io.reading import dcp_metadata

from . import scenarios

pytestmark = pytest.mark.filterwarnings("ignore")


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def state():
    return {"w": torch.arange(24.0).reshape(4, 6), "nested": {"b": torch.ones(3)}, "lr": [0.1, None], "epoch": 3}


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "evil.pt"  # a directory, whatever its name promises
    dcp.save(state(), checkpoint_id=path, no_dist=True)
    return path


def metadata_of(directory):
    return pickle.loads((directory / ".metadata").read_bytes())


def plant(where, directory, evil, protocol):
    metadata = metadata_of(directory)
    if where == "an opaque value":
        torch.save(evil, directory / "__9_0.distcp", pickle_protocol=2)
        info = next(iter(metadata.storage_data.values()))
        nbytes = (directory / "__9_0.distcp").stat().st_size
        index = next(index for index in metadata.storage_data if index.fqn == "epoch")
        metadata.storage_data[index] = dataclasses.replace(info, relative_path="__9_0.distcp", offset=0, length=nbytes)
    elif where == "the metadata":
        metadata = evil
    elif where == "a part of the metadata":
        metadata.planner_data = {**metadata.planner_data, "w": evil}
    elif where == "a key":
        metadata.storage_data[evil] = None
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol))


PLACES = ["the metadata", "a part of the metadata", "a key", "an opaque value"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("where", PLACES)
def test_a_directory_runs_nothing(where, protocol, directory, tmp_path, backend, capsys):
    marker = tmp_path / "was here"
    plant(where, directory, Evil(marker), protocol)
    with pytest.raises(pickle.UnpicklingError) as caught:
        conversion.dcp_to_file(directory, tmp_path / "out.pt", backend=backend)
    assert main(["convert", str(directory), str(tmp_path / "out.pt")]) == 2
    for said in (str(caught.value), capsys.readouterr().err):
        assert f"{os.mkdir.__module__}.mkdir" in said and str(directory) in said
        assert "--trust" in said and "weights_only=False" in said and "\x1b" not in said
        assert where != "an opaque value" or "'epoch'" in said
    assert names_in(tmp_path) == ["evil.pt"]
    main(["convert", "--trust", str(directory), str(tmp_path / "out.pt")])
    assert marker.is_dir()


def test_a_file_runs_nothing(tmp_path, backend, capsys):
    marker = tmp_path / "was here"
    torch.save({"w": filled(3), "e": Evil(marker)}, tmp_path / "evil.pt")
    for out in ("out.safetensors", "dir"):
        assert main(["convert", str(tmp_path / "evil.pt"), str(tmp_path / out)]) == 2
        assert f"{os.mkdir.__module__}.mkdir" in capsys.readouterr().err and names_in(tmp_path) == ["evil.pt"]
        assert main(["convert", "--trust", str(tmp_path / "evil.pt"), str(tmp_path / out)]) == 0
        marker.rmdir()
        shutil.rmtree(tmp_path / out) if out == "dir" else (tmp_path / out).unlink()
    with sio.open_checkpoint(tmp_path / "evil.pt", backend=backend, weights_only=False) as checkpoint:
        assert torch.equal(checkpoint["w"], filled(3))
    marker.rmdir()
    with sio.open_checkpoint(tmp_path / "evil.pt", backend=backend) as checkpoint:
        assert torch.equal(checkpoint["w"], filled(3)) and checkpoint.refused == {
            "e": (f"{os.mkdir.__module__}.mkdir",)
        }
    assert not marker.exists()


@pytest.mark.parametrize("relative_path", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", 5])
def test_nothing_outside_of_the_directory_is_read(relative_path, directory, tmp_path):
    metadata = metadata_of(directory)
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(info, relative_path=relative_path)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(sio.CorruptCheckpointError, match=r"\.metadata"):
        conversion.dcp_to_file(directory, tmp_path / "out.pt")
    assert names_in(tmp_path) == ["evil.pt"]


def test_a_part_is_not_larger_than_what_is_stored_of_it(directory, tmp_path):
    metadata = metadata_of(directory)
    described = metadata.state_dict_metadata["w"]
    size = torch.Size((1 << 20, 1 << 20))
    described.size = described.chunks[0].sizes = size
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(sio.CorruptCheckpointError, match="'w' is said to have"):
        conversion.dcp_to_file(directory, tmp_path / "out.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_of_any_protocol_is_what_pickle_makes_of_it(protocol, directory, tmp_path):
    metadata = metadata_of(directory)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    found = dcp_metadata.DirectoryReader(str(directory), weights_only=True).read_metadata()
    for part in ("state_dict_metadata", "storage_data", "planner_data"):
        assert getattr(found, part) == getattr(metadata, part)
    conversion.dcp_to_file(directory, tmp_path / "out.pt")
    assert scenarios.differences(state(), torch.load(tmp_path / "out.pt")) == []


class Member(enum.Enum):
    A = 1

    def __reduce_ex__(self, protocol):
        return getattr, (Member, "A")


def stream_of(module, name, *arguments):
    """A pickle of module.name(*arguments), whether or not there is such a thing."""
    stream = pickle.dumps(collections.Counter, 2)
    (position,) = (at for opcode, _, at in pickletools.genops(stream) if opcode.name == "GLOBAL")
    head = stream[:position] + f"c{module}\n{name}\n".encode()
    return head + pickle.dumps(arguments, 2)[2:-1] + b"R."


def test_what_other_pythons_and_older_torches_pickle():
    allowed = dcp_metadata.allowed_globals()
    for module in ("pathlib", "pathlib._local"):
        found = unpickled(stream_of(module, "PosixPath", "/", "a", "b"), allowed)
        assert found == pathlib.PurePosixPath("/a/b")
        found = unpickled(stream_of(module, "WindowsPath", "C:\\", "a"), allowed)
        assert found == pathlib.PureWindowsPath("C:\\a")
    encoding = "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING"
    assert encoding in allowed and encoding.replace("MEM_FORMAT_ENCODING", "TensorProperties") in allowed
    assert unpickled(pickle.dumps(Member.A, 4), {**allowed, f"{__name__}.Member": Member}) is Member.A
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        unpickled(pickle.dumps(Reduced(getattr, ({}, "keys")), 4), allowed)


class Reduced:
    def __init__(self, function, arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_what_is_allowed_is_allowed_to_nobody_else():
    before = torch.serialization.get_safe_globals()
    seen = []

    def look(*_):
        seen.append(torch.serialization.get_safe_globals())

    unpickled(stream_of("some.module", "look", 1), {"some.module.look": look})
    assert seen == [before] and torch.serialization.get_safe_globals() == before
    with torch.serialization.safe_globals([Member]):
        assert unpickled(pickle.dumps(Member, 4), {}) is Member
    with pytest.raises(pickle.UnpicklingError, match="Member"):
        unpickled(pickle.dumps(Member, 4), {})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.sampled_from([collections.OrderedDict, torch.Size, torch.float32, "collections", "OrderedDict", "torch"]),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(PLAIN, st.integers(2, 5))
def test_a_stream_in_protocol_2_is_the_same_pickle(value, protocol):
    twice = [value, value, str(value), "torch"]
    stream = in_protocol_2(pickle.dumps(twice, protocol))
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(stream)) <= 2
    found = pickle.loads(stream)
    assert found == twice and (found[0] is found[1] or not isinstance(value, (list, dict)))


def test_damaged_metadata_is_refused(directory, tmp_path):
    sound = (directory / ".metadata").read_bytes()
    rng = random.Random(5)
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"(.0abcR\x81\x93\x94})]hjqr"])
        (directory / ".metadata").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            dcp_metadata.DirectoryReader(str(directory), weights_only=True).read_metadata()
        except (pickle.UnpicklingError, sio.CorruptCheckpointError) as e:
            assert ".metadata" in str(e)


def test_names_asked_for_again_do_not_multiply():
    name = b"\x8c\xff" + b"x" * 255 + b"\x94"
    hostile = b"\x80\x04" + name + name + b"\x93" + b"h\0" * 100_000 + b"."
    assert len(in_protocol_2(hostile)) < 6 * len(hostile)
