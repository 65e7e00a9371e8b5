"""convert keeps every tensor or refuses, and a directory has its old checkpoint until it has the new one."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.dcp import SingleFileReader, conversion
from statedict_io.formats import safetensors_format
from statedict_io.names.nested_state import nested

from . import scenarios

pytestmark = pytest.mark.filterwarnings("ignore")

T, U = torch.arange(3.0), torch.arange(4.0)


def convert(source, destination, capsys):
    code = main(["convert", str(source), str(destination)])
    return code, capsys.readouterr().err


CLASHES = [
    ({"a": {"b": T}, "a.b": U}, "['a']['b']", "['a.b']"),
    ({"a.b": U, "a": {"b": T}}, "['a.b']", "['a']['b']"),
    ({0: T, "0": U}, "[0]", "['0']"),
    ({"m": [T], "m.0": U}, "['m'][0]", "['m.0']"),
    ({"m": {True: T}, "m.True": U}, "['m'][True]", "['m.True']"),
    ({"": {"": T}, ".": U}, "['']['']", "['.']"),
]


@pytest.mark.parametrize(("state", "first", "second"), CLASHES)
@pytest.mark.parametrize("out", ["out.safetensors", "dir/"])
def test_two_tensors_of_one_name_are_refused(state, first, second, out, tmp_path, capsys):
    torch.save(state, tmp_path / "in.pt")
    code, said = convert(tmp_path / "in.pt", f"{tmp_path}/{out}", capsys)
    assert code == 2 and first in said and second in said and "in.pt" in said
    assert names_in(tmp_path) == ["in.pt"]


def test_names_that_safetensors_does_not_have(tmp_path, capsys):
    for name, what in (("__metadata__", "'__metadata__'"), ("\ud800", "UTF-8")):
        torch.save({name: T, "w": U}, tmp_path / "in.pt")
        code, said = convert(tmp_path / "in.pt", tmp_path / "out.safetensors", capsys)
        assert code == 2 and what in said and "in.pt" in said and names_in(tmp_path) == ["in.pt"]
        assert convert(tmp_path / "in.pt", tmp_path / "dir", capsys)[0] == 0
        assert convert(tmp_path / "dir", tmp_path / "back.pt", capsys)[0] == 0
        assert scenarios.differences({name: T, "w": U}, torch.load(tmp_path / "back.pt")) == []
        (tmp_path / "back.pt").unlink()
        for entry in (tmp_path / "dir").iterdir():
            entry.unlink()
        (tmp_path / "dir").rmdir()


def test_tensors_where_names_do_not_lead_are_refused(tmp_path, capsys, backend):
    torch.save({"w": T, "s": {U}, "plain": {1, 2}}, tmp_path / "in.pt")
    with sio.open_checkpoint(tmp_path / "in.pt", backend=backend) as checkpoint:
        assert len(checkpoint.hidden) == 1 and "'s' is a set" in checkpoint.hidden[0]
    code, said = convert(tmp_path / "in.pt", tmp_path / "out.safetensors", capsys)
    assert code == 2 and "'s' is a set with tensors in it" in said and names_in(tmp_path) == ["in.pt"]


def test_a_header_that_safetensors_would_not_read_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_format, "MAX_HEADER_NBYTES", 1000)
    torch.save({f"a long name of a tensor {i}": T for i in range(20)}, tmp_path / "in.pt")
    code, said = convert(tmp_path / "in.pt", tmp_path / "out.safetensors", capsys)
    assert code == 2 and "at most 1000" in said and names_in(tmp_path) == ["in.pt"]


def safetensors_of(described, data):
    header = described if isinstance(described, bytes) else json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_a_name_that_is_in_a_header_twice(tmp_path, capsys):
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    (tmp_path / "in.safetensors").write_bytes(safetensors_of(f'{{"a":{entry},"a":{entry}}}'.encode(), b"1"))
    code, said = convert(tmp_path / "in.safetensors", tmp_path / "out.pt", capsys)
    assert code == 2 and "'a'" in said and names_in(tmp_path) == ["in.safetensors"]


def test_metadata_that_is_left_out_is_named(tmp_path, capsys):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    for metadata, is_named in (({"format": "pt"}, False), ({"format": "pt", "author": "me"}, True)):
        (tmp_path / "in.safetensors").write_bytes(safetensors_of({"__metadata__": metadata, "a": entry}, b"1"))
        code, said = convert(tmp_path / "in.safetensors", tmp_path / "out.pt", capsys)
        assert code == 0 and ("author" in said) == is_named and "format" not in said


def test_a_state_comes_back_from_a_directory(tmp_path, capsys, backend):
    state = {
        "empty": {}, "inner": {"empty": {}, "w": T}, "list": [{}, {"w": U}, []], "a": T, "a.b": U, "a.b.c": [1, 2],
        "tuple": (T, {"x": U}), "set": {3}, "": {"": T}, "none": None,
    }  # fmt: skip
    torch.save(state, tmp_path / "in.pt")
    conversion.file_to_dcp(tmp_path / "in.pt", tmp_path / "dir", backend=backend)
    conversion.dcp_to_file(tmp_path / "dir", tmp_path / "back.pt", backend=backend)
    found = torch.load(tmp_path / "back.pt")
    assert scenarios.differences(state, found) == [] and list(found) == list(state)
    wanted = {"inner": {"w": torch.zeros(3), "empty": {}}, "a": torch.zeros(3)}
    for reader in (dcp.FileSystemReader(tmp_path / "dir"), SingleFileReader(tmp_path / "in.pt", backend=backend)):
        wanted["inner"]["w"].zero_()
        dcp.load(wanted, storage_reader=reader, no_dist=True)
        assert torch.equal(wanted["inner"]["w"], T) and torch.equal(wanted["a"], T)


def test_what_a_directory_does_not_keep_is_named(tmp_path, capsys):
    torch.save({"state": {0: {"m": T}, 1: {"m": U}}, "tied": [T, T[1:]], "w": U.clone()}, tmp_path / "in.pt")
    code, said = convert(tmp_path / "in.pt", tmp_path / "dir", capsys)
    assert code == 0 and "state.0.m, state.1.m" in said and "strings" in said
    assert "own copy: tied.0, tied.1" in said and "w" not in said.split("own copy")[1].replace("own", "")


@pytest.mark.parametrize(
    "paths",
    [
        {"x": ("a",), "y": ("a",)},
        {"x": ("a",), "y": ("a", "b")},
        {"y": ("a", "b"), "x": ("a",)},
        {"x": ("a", 0), "y": ("a", "b")},
        {"x": ("a", 0, "b"), "y": ("a", 0)},
        {"a": ("b",), "b": ("b", "c")},
    ],
)
def test_two_values_in_one_place_are_refused(paths):
    with pytest.raises(sio.StateDictIOError) as caught:
        nested([(name, 1) for name in paths], paths)
    assert all(repr(name) in str(caught.value) for name in paths)


@pytest.mark.parametrize("path", [(), "a", ("a", None), (0,), ("a", -1), ("a", 1 << 40), ["a"]])
def test_a_place_that_is_none_is_refused(path):
    with pytest.raises(sio.StateDictIOError, match="'x'"):
        nested([("x", 1)], {"x": path})


# --- The directory


def loaded(directory):
    found = {f"t{i}": torch.zeros(1000) for i in range(6)}
    dcp.load(found, checkpoint_id=directory, no_dist=True)
    values = {float(tensor[0]) for tensor in found.values()} | {float(tensor[-1]) for tensor in found.values()}
    assert len(values) == 1, values
    return values.pop()


def write(path, value):
    torch.save({f"t{i}": torch.full((1000,), float(value)) for i in range(6)}, path)


@pytest.fixture
def old(tmp_path):
    """A directory of stock DCP's with the value 1, and a file with the value 2."""
    write(tmp_path / "new.pt", 2)
    dcp.save({f"t{i}": torch.full((1000,), 1.0) for i in range(6)}, checkpoint_id=tmp_path / "dir", no_dist=True)
    (tmp_path / "dir" / "notes.txt").write_text("mine")
    return tmp_path / "dir"


def test_a_checkpoint_is_replaced_and_its_files_are_removed(old, tmp_path, capsys):
    before = set(names_in(old))
    for _ in range(2):
        assert convert(tmp_path / "new.pt", old, capsys)[0] == 0
        assert loaded(old) == 2
        assert len(names_in(old)) == 3 and "notes.txt" in names_in(old)
    assert set(names_in(old)) & before == {".metadata", "notes.txt"}
    dcp.save({"w": T}, checkpoint_id=tmp_path / "stock", no_dist=True)
    stock, ours = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("stock", "dir"))
    assert getattr(ours, "version", None) == getattr(stock, "version", None)
    assert ours.storage_meta.checkpoint_id == old and ours.storage_meta.save_id


@pytest.mark.parametrize("at", ["the first tensor", "the last tensor", "the metadata"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_the_old_checkpoint(error, at, old, tmp_path, monkeypatch):
    before = {name: (old / name).read_bytes() for name in names_in(old)}
    fail_at(at, error, monkeypatch)
    with pytest.raises(type(error)):
        conversion.file_to_dcp(tmp_path / "new.pt", old)
    assert {name: (old / name).read_bytes() for name in names_in(old)} == before and loaded(old) == 1
    with pytest.raises(type(error)):
        conversion.file_to_dcp(tmp_path / "new.pt", tmp_path / "another")
    assert names_in(tmp_path) == ["dir", "new.pt"]


def fail_at(at, error, monkeypatch):
    if at == "the metadata":

        def dump(*_):
            raise error

        monkeypatch.setattr(pickle, "dump", dump)
        return
    resolve = conversion._FromFile.resolve_data
    last = {"the first tensor": "t0", "the last tensor": "t5"}[at]

    def resolve_data(self, item):
        if item.index.fqn == last:
            raise error
        return resolve(self, item)

    monkeypatch.setattr(conversion._FromFile, "resolve_data", resolve_data)


def test_an_error_behind_the_exchange_leaves_the_new_checkpoint(old, tmp_path, monkeypatch):
    from statedict_io.writing.replacement import Replacement

    commit = Replacement.commit

    def commit_and_fail(self, *args, **options):
        commit(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Replacement, "commit", commit_and_fail)
    with pytest.raises(KeyboardInterrupt):
        conversion.file_to_dcp(tmp_path / "new.pt", old)
    assert loaded(old) == 2


KILLED = """
import os, sys
from statedict_io.dcp import conversion
resolve = conversion._FromFile.resolve_data
def resolve_data(self, item):
    if item.index.fqn == "t4":
        os._exit(9)
    return resolve(self, item)
conversion._FromFile.resolve_data = resolve_data
conversion.file_to_dcp(sys.argv[1], sys.argv[2])
"""


def test_a_conversion_that_is_killed_leaves_the_old_checkpoint(old, tmp_path, capsys):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, tmp_path / "new.pt", old], timeout=300)
    assert done.returncode == 9 and loaded(old) == 1
    assert len(names_in(old)) == 4, "what the killed one has written is there"
    assert convert(tmp_path / "new.pt", old, capsys)[0] == 0
    assert loaded(old) == 2 and len(names_in(old)) == 3, "and is gone with the next conversion"


def test_checkpoints_of_single_ranks_keep_their_files(old, tmp_path, capsys):
    before = names_in(old)
    (old / "__0.metadata").write_bytes((old / ".metadata").read_bytes())
    assert convert(tmp_path / "new.pt", old, capsys)[0] == 0
    assert loaded(old) == 2 and set(before) < set(names_in(old))


AGAIN = "import sys; from statedict_io.dcp import conversion as c; [c.file_to_dcp(*sys.argv[1:]) for _ in range(8)]"


def test_two_processes_at_once(old, tmp_path):
    write(tmp_path / "three.pt", 3)
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", AGAIN, tmp_path / name, old])
        for name in ("new.pt", "three.pt")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert loaded(old) in (2, 3)
    assert len(names_in(old)) == 3, names_in(old)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_a_directory_behind_a_link(old, tmp_path, capsys):
    (tmp_path / "link").symlink_to("dir")
    assert convert(tmp_path / "new.pt", tmp_path / "link", capsys)[0] == 0
    assert loaded(old) == 2 and (tmp_path / "link").is_symlink()
