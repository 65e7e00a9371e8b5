"""`convert` into sets of shards, and sums beside what `convert` writes."""

import errno
import hashlib
import json
import os

import pytest
import torch
from conftest import require_package
from corpus_case import filled
from oracle import names_in
from shard_sets import contents_of as contents
from shard_sets import state_of, whole_set

import statedict_io as sio
from statedict_io.__main__ import _shard_nbytes, main
from statedict_io.conversion import convert

from .test_conversions import OTHERS, SOURCES, TENSORS

package = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NBYTES = 900  # three tensors, of 4800, 14 and 96 bytes


def sums_of(folder):
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


@pytest.mark.parametrize("source", SOURCES)
def test_the_files_are_those_of_huggingface_hub(source, tmp_path, capsys):
    require_package("huggingface_hub")
    import huggingface_hub as hub

    SOURCES[source](tmp_path)
    before = names_in(tmp_path)
    where = str(tmp_path / "out") + os.sep
    assert main(["convert", "--max-shard-size", str(NBYTES), str(tmp_path / source), where]) == 0
    assert names_in(tmp_path) == sorted([*before, "out"])
    (tmp_path / "ref").mkdir()
    with sio.open_checkpoint(tmp_path / "out") as ckpt:
        hub.save_torch_state_dict({name: TENSORS[name] for name in ckpt}, tmp_path / "ref", max_shard_size=NBYTES)
        assert len(ckpt) == len(TENSORS)
    assert contents(tmp_path / "out") == contents(tmp_path / "ref") and len(os.listdir(tmp_path / "out")) == 3
    said = capsys.readouterr().err
    assert all(name in said for name in OTHERS) == (source in ("zip", "legacy", "dcp"))


@pytest.mark.parametrize("name", ["llama.safetensors", "llama.safetensors.index.json"])
def test_into_a_folder_that_is_there(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    SOURCES["zip"](tmp_path)
    for nbytes, files in ((NBYTES, 3), (100, 4), (10**6, 1)):
        done = convert(str(tmp_path / "zip"), str(tmp_path / name), max_shard_nbytes=nbytes)
        assert done.num_tensors == 3 and done.sums == {} and [*done.left_out] == ["epoch", "names.0", "names.1"]
        assert len(list(tmp_path.glob("llama*"))) == files
    assert sio.diff(tmp_path / "llama.safetensors", tmp_path / "zip").equal
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("new", [4000, 8000, 10**6])
def test_a_set_into_its_own_folder(new, tmp_path):
    """All of it has been read before anything of it goes."""
    sio.save_safetensors(state_of(3), tmp_path, {"made": "by hand"}, max_shard_nbytes=4000, digest="sha256")
    done = convert(str(tmp_path), str(tmp_path), max_shard_nbytes=new, digest="sha256")
    assert whole_set(tmp_path) == 3
    assert len(os.listdir(tmp_path)) == len(done.sums) + 1 == {4000: 5, 8000: 4, 10**6: 2}[new]
    with sio.open_checkpoint(tmp_path) as ckpt:
        assert ckpt.metadata == {"format": "pt", "made": "by hand"}


def test_metadata_goes_where_it_belongs(tmp_path, capsys):
    """To the header of a file, to the index of several."""
    metadata = {"format": "pt", "step": "7", "note": "né"}
    package.save_file(TENSORS, tmp_path / "one.safetensors", metadata)
    convert(str(tmp_path / "one.safetensors"), str(tmp_path / "set"), max_shard_nbytes=NBYTES)
    index = json.loads((tmp_path / "set" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4910, "step": "7", "note": "né"}
    for source in ("one.safetensors", "set"):
        convert(str(tmp_path / source), str(tmp_path / "again.safetensors"))
        with sio.open_checkpoint(tmp_path / "again.safetensors") as ckpt:
            assert ckpt.metadata == metadata
        assert main(["convert", str(tmp_path / source), str(tmp_path / "again.pt")]) == 0
        assert "step" in capsys.readouterr().err


def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["damaged", "refused by the format", "missing", "a write that fails"])
def test_what_fails_leaves_what_was_there(broken, tmp_path, monkeypatch):
    """No folder that was made for it, and the set that is there as it was."""
    dtype = torch.complex128 if broken == "refused by the format" else torch.float32
    torch.save({"w": filled(300, dtype=dtype)}, tmp_path / "a")
    if broken == "damaged":
        data = bytearray((tmp_path / "a").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "a").write_bytes(data)
    elif broken == "missing":
        (tmp_path / "a").unlink()
    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000)
    before = contents(tmp_path)
    if broken == "a write that fails":
        monkeypatch.setattr("statedict_io.writing.shard_sets.write_content", fail)
    for place in ("new", "new/", "."):
        with pytest.raises((OSError, sio.StateDictIOError)) as caught:
            convert(str(tmp_path / "a"), os.path.join(tmp_path, place), max_shard_nbytes=100)
        assert str(tmp_path) in str(caught.value)
        assert contents(tmp_path) == before
    (tmp_path / "taken").touch()
    with pytest.raises((OSError, sio.StateDictIOError), match="a"):
        convert(str(tmp_path / "a"), str(tmp_path / "taken"), max_shard_nbytes=100)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-shard-size", "5GB", "a", "out.pt"], "ends in .safetensors"),
        (["--max-shard-size", "5GB", "--in-place", "a", "out/"], "in place"),
        (["--max-shard-size", "5GB", "a", "memory://x/y"], "local directory"),
        (["a", "out.safetensors.index.json"], "how large"),
        (["--digest", "sha256", "a", "out/"], "has no sums"),
        (["--max-shard-size", "0", "a", "out/"], "not a size"),
        (["--max-shard-size", "5XB", "a", "out/"], "not a size"),
    ],
)
def test_what_does_not_fit_together(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(TENSORS, "a")
    try:
        assert main(["convert", *words]) == 2
    except SystemExit as e:
        assert e.code == 2
    assert says in capsys.readouterr().err and os.listdir() == ["a"]


def test_sizes_are_those_of_huggingface_hub():
    hub = pytest.importorskip("huggingface_hub.serialization._base")
    for text in ("1", "900", "5GB", "5gb", "10MB", "7KB", "2TB", "3GiB", "3MIB", "4KiB"):
        theirs = hub.parse_size_to_int(text) if text[-1].upper() == "B" and "I" not in text.upper() else None
        unit = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}.get(text.lstrip("0123456789").upper())
        assert _shard_nbytes(text) == (theirs if theirs is not None else int(text.rstrip("KMGTiIBb")) * unit)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("destination", ["new.pt", "new.safetensors", "set"])
def test_sums(source, destination, tmp_path, capsys):
    SOURCES[source](tmp_path)
    into_set = ["--max-shard-size", str(NBYTES)] if destination == "set" else []
    (tmp_path / "out").mkdir()
    for _ in range(2):
        assert (
            main(
                [
                    "convert",
                    "--digest",
                    "sha256",
                    *into_set,
                    str(tmp_path / source),
                    str(tmp_path / "out" / destination),
                ]
            )
            == 0
        )
        folder = tmp_path / "out" / "set" if into_set else tmp_path / "out"
        beside = "model.safetensors.index.json.sha256" if into_set else f"{destination}.sha256"
        expected = sums_of(folder)
        lines = [line.split("  ") for line in (folder / beside).read_text().splitlines()]
        assert {name: hexdigest for hexdigest, name in lines} == {
            name: hexdigest for name, hexdigest in expected.items() if name != beside
        }
        assert all(f"{hexdigest}  {name}" in capsys.readouterr().out for hexdigest, name in lines[:1])
        assert names_in(tmp_path) == sorted([source, "out"])


@pytest.mark.parametrize("destination", ["model.pt", "model.safetensors"])
def test_to_a_url(destination, tmp_path):
    require_package("fsspec")
    import fsspec

    SOURCES["zip"](tmp_path)
    url = f"memory://conversions/{destination}"
    done = convert(str(tmp_path / "zip"), url, digest="sha256")
    with fsspec.open(url) as file:
        data = file.read()
    convert(str(tmp_path / "zip"), str(tmp_path / destination))
    assert data == (tmp_path / destination).read_bytes()
    with fsspec.open(f"{url}.sha256", "r") as file:
        assert file.read() == f"{done.sums[destination]}  {destination}\n"
    assert hashlib.sha256(data).hexdigest() == done.sums[destination]
