"""`convert` from every kind of checkpoint to every kind that it writes: nothing is lost, or it is named."""

import json
import os

import pytest
import torch
from corpus_case import filled
from equality import difference
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main

package = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TENSORS = {"a.w": filled(40, 30), "a.b": filled(7, dtype=torch.bfloat16), "c": filled(3, 4, dtype=torch.int64)}
OTHERS = {"epoch": 7, "names": ["x", "y"]}


def write_shards(folder, suffix):
    folder.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number, name in enumerate(TENSORS, 1):
        file = f"{stem}-{number:05}-of-00003{suffix}"
        (package.save_file if suffix == ".safetensors" else torch.save)({name: TENSORS[name]}, folder / file)
        weight_map[name] = file
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_dcp(folder, obj):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save(obj, checkpoint_id=folder, no_dist=True)


SOURCES = {
    "zip": lambda at: torch.save({**TENSORS, **OTHERS}, at / "zip"),
    "legacy": lambda at: torch.save({**TENSORS, **OTHERS}, at / "legacy", _use_new_zipfile_serialization=False),
    "safetensors": lambda at: package.save_file(TENSORS, at / "safetensors", metadata={"format": "pt"}),
    "shards": lambda at: write_shards(at / "shards", ".safetensors"),
    "shards of zip": lambda at: write_shards(at / "shards of zip", ".bin"),
    "dcp": lambda at: write_dcp(at / "dcp", {**TENSORS, **OTHERS}),
}


def tensors_of(path):
    if path.is_dir():
        dcp = pytest.importorskip("torch.distributed.checkpoint")
        found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
        dcp.load(found, checkpoint_id=path, no_dist=True)
        return found
    with sio.open_checkpoint(path) as ckpt:
        return dict(ckpt)


@pytest.mark.parametrize("destination", ["new.pt", "new.safetensors", "new_dcp/"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_to_every_kind(source, destination, tmp_path, capsys):
    SOURCES[source](tmp_path)
    before = names_in(tmp_path)
    if source == "dcp" and destination.endswith("/"):
        pytest.skip("a directory is copied with cp")
    assert main(["convert", str(tmp_path / source), os.path.join(tmp_path, destination)]) == 0, capsys.readouterr().err
    found = tensors_of(tmp_path / destination.rstrip("/"))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (found[name], tensor)))
    has_others = source in ("zip", "legacy", "dcp")
    said = capsys.readouterr().err
    if destination == "new.pt" and has_others:
        assert {name: sio.load(tmp_path / "new.pt")[name] for name in OTHERS} == OTHERS and "left out" not in said
    elif destination == "new.safetensors" and has_others:
        assert "epoch" in said
    assert names_in(tmp_path) == sorted([*before, destination.rstrip("/")])


def shared():
    base = filled(200, 300)
    return {
        "model": {"w": base, "t": base.t(), "part": base[3:9, ::2], "conj": filled(4, dtype=torch.complex64).conj()},
        "sparse": torch.eye(5).to_sparse(),
        "p": torch.nn.Parameter(filled(3)),
        "none": torch.empty(0, 2),
        "list": [filled(3), 1.5, "x", {2, 3}],
        7: "a key that is no string",
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_an_object_becomes_what_torch_would_save_of_it(zipped, tmp_path):
    """Structure, sharing and other values are kept; of a file in torch's own format all bytes."""
    torch.save(shared(), tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    assert main(["convert", str(tmp_path / "old.pth"), str(tmp_path / "new.pt")]) == 0
    (tmp_path / "ref").mkdir()
    torch.save(torch.load(tmp_path / "old.pth"), tmp_path / "ref" / "new.pt")
    assert difference(torch.load(tmp_path / "ref" / "new.pt"), torch.load(tmp_path / "new.pt")) is None
    assert (tmp_path / "new.pt").read_bytes() == (tmp_path / "ref" / "new.pt").read_bytes()
    assert sio.verify(tmp_path / "new.pt").ok


class Foreign:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_refused_is_not_lost(zipped, tmp_path, capsys):
    torch.save({"w": filled(3), "config": Foreign()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for destination in ("new.pt", "new.safetensors", "new_dcp/"):
        assert main(["convert", str(tmp_path / "a.pt"), os.path.join(tmp_path, destination)]) == 2
        assert "Foreign" in capsys.readouterr().err
    assert names_in(tmp_path) == ["a.pt"]
    assert main(["convert", "--trust", str(tmp_path / "a.pt"), str(tmp_path / "new.pt")]) == 0
    assert type(torch.load(tmp_path / "new.pt", weights_only=False)["config"]) is Foreign


def test_dtypes_that_torch_lacks_are_not_lost(tmp_path, capsys):
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    for destination in ("new.pt", "new.safetensors"):
        assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / destination)]) == 2
        assert "F6_E2M3" in capsys.readouterr().err
    assert names_in(tmp_path) == ["a.safetensors"]


def test_damage_is_not_converted(tmp_path, capsys):
    torch.save({"w": filled(300)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "new.pt")]) == 2
    assert "data/0" in capsys.readouterr().err and names_in(tmp_path) == ["a.pt"]


def test_a_destination_that_is_the_source(tmp_path):
    package.save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "m.safetensors").read_bytes()
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "m.safetensors")]) == 0
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert main(["convert", "--in-place", str(tmp_path / "m.safetensors"), str(tmp_path / "m.safetensors")]) == 2
    assert (tmp_path / "m.safetensors").read_bytes() == before
