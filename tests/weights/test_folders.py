"""Folders of weights and indexes of shards, as huggingface_hub and transformers write them, and broken ones."""

import json
import os
import shutil

import pytest
import torch
from corpus_case import filled
from equality import difference

import statedict_io as sio
from statedict_io.__main__ import main

package = pytest.importorskip("safetensors.torch")

TENSORS = {f"layer.{i}.weight": filled(40, 30, seed=i) for i in range(8)} | {"head": filled(7, dtype=torch.bfloat16)}
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def write(path, tensors):
    if path.suffix == ".safetensors":
        package.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def sharded(folder, single, num_shards=3):
    """Writes TENSORS in shards with their index, returns that."""
    stem, suffix = os.path.splitext(single)
    weight_map = {}
    names = list(TENSORS)
    for shard in range(num_shards):
        file = f"{stem}-{shard + 1:05}-of-{num_shards:05}{suffix}"
        write(folder / file, {name: TENSORS[name] for name in names[shard::num_shards]})
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: weight_map[name] for name in names}}
    (folder / f"{single}.index.json").write_text(json.dumps(index, indent=2))
    return folder / f"{single}.index.json"


@pytest.fixture(params=[SAFETENSORS, PICKLED])
def index(request, tmp_path):
    (tmp_path / "weights").mkdir()
    return sharded(tmp_path / "weights", request.param)


def change(index, edit):
    found = json.loads(index.read_text())
    edit(found["weight_map"])
    index.write_text(json.dumps(found))


def shard(index, number):
    return sorted(path for path in index.parent.iterdir() if "-of-" in path.name)[number]


def everything(path, backend):
    """Every reader, each with what it found."""
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        yield dict(ckpt)
    yield sio.load(path, backend=backend)


@pytest.mark.parametrize("given", ["folder", "index", "folder/", "PathLike"])
def test_shards(given, index, backend):
    folder = str(index.parent)
    path = {"folder": folder, "index": str(index), "folder/": folder + os.sep, "PathLike": index.parent}[given]
    for found in everything(path, backend):
        assert difference(TENSORS, found) is None
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert list(ckpt) == list(TENSORS)
        part = ckpt.get_slice("layer.3.weight")[5:9, 2].numpy().tobytes()
        assert part == TENSORS["layer.3.weight"][5:9, 2].numpy().tobytes()
        info = ckpt.info("layer.3.weight")
        assert info.path == str(shard(index, 0)) and info.nbytes == 4800
        assert shard(index, 0).read_bytes()[info.offset :][:4800] == TENSORS["layer.3.weight"].numpy().tobytes()
    report = sio.verify(path, backend=backend)
    assert report.ok and report.path == str(path)
    assert report.checksums == ("none" if "safetensors" in index.name else "crc32")
    assert f"{shard(index, 0).name}:" in report.records[0].name
    assert main(["verify", str(path)]) == 0


@pytest.mark.parametrize("single", [SAFETENSORS, PICKLED, "adapter.safetensors", "weights.pt", "one.pth"])
def test_a_folder_with_one_file(single, backend, tmp_path):
    write(tmp_path / single, TENSORS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.txt").write_text("x")
    for found in everything(tmp_path, backend):
        assert found.keys() == TENSORS.keys() and difference(TENSORS, {name: found[name] for name in TENSORS}) is None
    assert sio.verify(tmp_path, backend=backend).ok


def test_which_file_of_a_folder_is_read(tmp_path):
    """In the order of transformers."""
    expected = {}
    for name in ("pytorch_model.bin.index.json", PICKLED, "model.safetensors.index.json", SAFETENSORS):
        if name.endswith(".json"):
            sharded(tmp_path, name.removesuffix(".index.json"), 2)
            expected = TENSORS
        else:
            expected = {name: filled(3)}
            write(tmp_path / name, expected)
        assert difference(expected, sio.load(tmp_path)) is None


def test_shards_are_opened_when_they_are_needed(index, backend):
    shard(index, 2).unlink()
    with sio.open_checkpoint(index.parent, backend=backend) as ckpt:
        assert len(ckpt) == len(TENSORS)
        assert difference(TENSORS["layer.0.weight"], ckpt["layer.0.weight"]) is None
        with pytest.raises(FileNotFoundError) as caught:
            ckpt["layer.2.weight"]
    assert caught.value.filename == str(shard(index, 0)).replace("-00001-", "-00003-")


def test_a_missing_shard(index, backend, capsys):
    missing = str(shard(index, 1))
    shard(index, 1).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        sio.load(index.parent, backend=backend)
    assert caught.value.filename == missing
    (problem,) = sio.verify(index.parent, backend=backend).problems
    assert missing in problem and str(index) in problem
    assert main(["verify", str(index)]) == 1 and main(["inspect", str(index)]) == 2
    assert missing in capsys.readouterr().err


BROKEN = {
    "a shard lacks a name": (lambda map: map.update(extra=map["head"]), "lacks tensors that .*extra"),
    "a name is not in the index": (lambda map: map.pop("head"), "'head', which .* does not name"),
    "a name in another shard than it says": (
        lambda map: map.update(head=map["layer.0.weight"]),
        r"lacks tensors that .*head|'head' is in it, and in",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_index_that_says_otherwise(what, index, backend):
    edit, message = BROKEN[what]
    change(index, edit)
    with pytest.raises(sio.CorruptCheckpointError, match=rf"-of-00003\.\w+: .*({message})"):
        sio.load(index.parent, backend=backend)
    said = rf"-of-00003\.\w+: .*({message})"
    with sio.open_checkpoint(index, backend=backend) as ckpt, pytest.raises(sio.CorruptCheckpointError, match=said):
        dict(ckpt)
    report = sio.verify(index, backend=backend)
    assert not report.ok and main(["verify", str(index)]) == 1


def test_a_name_in_two_shards(index, backend):
    again = {**{name: TENSORS[name] for name in list(TENSORS)[1::3]}, "layer.0.weight": TENSORS["layer.0.weight"]}
    write(shard(index, 1), again)
    with pytest.raises(sio.CorruptCheckpointError, match=r"-00002-.*'layer\.0\.weight' is in it, and in .*-00001-"):
        sio.load(index, backend=backend)
    text = index.read_text()
    index.write_text(text.replace('"layer.1.weight"', '"layer.0.weight"'))
    with pytest.raises(sio.CorruptCheckpointError, match=r"index\.json: .*in two shards"):
        sio.load(index, backend=backend)
    assert not sio.verify(index, backend=backend).ok


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/inside.safetensors", "..", ".", "", "C:outside", "..\\outside.safetensors", "a\0b"],
)
def test_nothing_outside_the_folder_is_opened(name, index, backend, tmp_path):
    write(tmp_path / "outside.safetensors", {"head": filled(3)})
    (index.parent / "sub").mkdir()
    write(index.parent / "sub" / "inside.safetensors", {"head": filled(3)})
    absolute = str(tmp_path / "outside.safetensors")
    for given in (name, absolute):
        change(index, lambda map, given=given: map.update(head=given))
        with pytest.raises(sio.CorruptCheckpointError, match=r"index\.json: .*not the name of a file beside it"):
            sio.open_checkpoint(index, backend=backend)
        with pytest.raises(sio.CorruptCheckpointError, match="not the name of a file beside it"):
            sio.load(index.parent, backend=backend)
        assert not sio.verify(index, backend=backend).ok


def test_links_within_the_folder_are_followed(index, backend, tmp_path):
    """As in the cache of huggingface_hub."""
    (tmp_path / "snapshot").mkdir()
    for path in index.parent.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert difference(TENSORS, sio.load(tmp_path / "snapshot", backend=backend)) is None


@pytest.mark.parametrize("text", ["{", "[]x", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}'])
def test_an_index_that_is_damaged(text, backend, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    for call in (sio.load, sio.open_checkpoint):
        with pytest.raises((sio.CorruptCheckpointError, sio.FileKindError), match=r"index\.json"):
            call(path, backend=backend)
    assert main(["verify", str(path)]) in (1, 2)


def test_a_damaged_shard_is_named(index, backend, capsys):
    data = bytearray(shard(index, 1).read_bytes())
    data[len(data) // 2] ^= 1
    shard(index, 1).write_bytes(data if "bin" in index.name else data[:-1])
    report = sio.verify(index, backend=backend)
    assert not report.ok and all(str(shard(index, 1)) in problem for problem in report.problems)
    if "safetensors" in index.name:
        with pytest.raises(sio.CorruptCheckpointError, match="-00002-"):
            sio.load(index, backend=backend)
    else:
        with pytest.raises(sio.CorruptCheckpointError, match="-00002-"):
            sio.load(index, backend=backend, verify=True)
        assert main(["convert", str(index), str(index.parent.parent / "out.safetensors")]) == 2


def test_folders_without_weights_and_with_many(backend, tmp_path):
    for call in (sio.load, sio.open_checkpoint, sio.verify):
        with pytest.raises(sio.FileKindError, match="without weights"):
            call(tmp_path, backend=backend)
    with pytest.raises(IsADirectoryError):
        sio.load(tmp_path, backend=backend)  # as torch.load
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / name, TENSORS)
    with pytest.raises(sio.FileKindError, match=r"several .*a\.safetensors, b\.safetensors"):
        sio.load(tmp_path, backend=backend)
    for damaged, says in ((b"", "empty"), (b"\x80\x02]q", "cannot be unpickled")):
        (tmp_path / ".metadata").write_bytes(damaged)  # of a directory of torch.distributed.checkpoint
        for call in (sio.load, sio.open_checkpoint):
            with pytest.raises(sio.CorruptCheckpointError, match=rf"\.metadata.*{says}"):
                call(tmp_path, backend=backend)
        assert main(["verify", str(tmp_path)]) == 1


def test_an_index_is_no_shard(index, backend):
    change(index, lambda map: map.update({name: index.name for name in map}))
    with pytest.raises(sio.FileKindError, match="JSON"), sio.open_checkpoint(index, backend=backend) as ckpt:
        dict(ckpt)
    with pytest.raises((sio.FileKindError, sio.CorruptCheckpointError, RecursionError)):
        sio.load(index, backend=backend)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_convert_shards_into_one_file(suffix, index, tmp_path, capsys):
    path = tmp_path / f"one{suffix}"
    assert main(["convert", str(index.parent), str(path)]) == 0, capsys.readouterr().err
    found = sio.load(path)
    assert difference(TENSORS, {name: found[name] for name in TENSORS}) is None
    if suffix == ".safetensors":
        package.save_file(TENSORS, tmp_path / "ref.safetensors", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "ref.safetensors").read_bytes()
    else:
        assert sio.verify(path).ok and list(found) == list(TENSORS)


def test_inspect(index, capsys):
    assert main(["inspect", "--json", str(index.parent)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in found["tensors"]] == list(TENSORS)
    assert found["format"]["shards"] == 3
    assert main(["inspect", str(index)]) == 0


def test_urls(index, backend):
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.store.clear()
    for path in index.parent.iterdir():
        fs.pipe_file(f"/weights/{path.name}", path.read_bytes())
    for url in (f"memory://weights/{index.name}", "memory://weights/"):
        for found in everything(url, backend):
            assert difference(TENSORS, found) is None
        assert sio.verify(url, backend=backend).ok
    fs.store.clear()


def test_a_folder_that_the_hub_wrote(backend, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_state_dict(TENSORS, tmp_path, max_shard_size=10_000)
    assert len(list(tmp_path.iterdir())) > 3
    for found in everything(tmp_path, backend):
        assert difference(TENSORS, {name: found[name] for name in TENSORS}) is None
    assert sio.verify(tmp_path, backend=backend).ok
    shutil.rmtree(tmp_path)
