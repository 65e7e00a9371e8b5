"""Checkpoint directories of torch.distributed.checkpoint in everything that reads."""

import dataclasses
import io
import itertools
import json
import math
import pickle
import random

import pytest
import torch
from conftest import require_package
from corpus_case import filled
from equality import difference

import statedict_io as sio
from statedict_io.__main__ import main

dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint import filesystem, metadata  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def cut(shape, *cuts):
    """Boxes of a grid: for each dimension the sizes along it."""
    assert [sum(sizes) for sizes in cuts] == [*shape]
    starts = [[*itertools.accumulate([0, *sizes[:-1]])] for sizes in cuts]
    return [
        (offsets, sizes) for offsets, sizes in zip(itertools.product(*starts), itertools.product(*cuts), strict=True)
    ]


def write(folder, tensors, values=()):
    """As ranks write it, each a file: name -> (tensor, boxes), and name -> value."""
    folder.mkdir()
    described, places, paths = {}, {}, {}
    files = {f"__{rank}_0.distcp": bytearray() for rank in range(3)}
    ranks = itertools.cycle(files)

    def place(index, obj):
        file = next(ranks)
        torch.save(obj, part := io.BytesIO())
        places[index] = filesystem._StorageInfo(file, len(files[file]), len(part.getvalue()))
        files[file] += part.getvalue()

    for name, (tensor, boxes) in tensors.items():
        chunks = [metadata.ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
        properties = metadata.TensorProperties(dtype=tensor.dtype)
        described[name] = metadata.TensorStorageMetadata(properties, tensor.size(), chunks)
        for at, sizes in boxes:
            piece = tensor[tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))].clone()
            place(metadata.MetadataIndex(name, torch.Size(at)), piece)
        paths[name] = tuple(name.split("."))
    for name, value in dict(values).items():
        described[name] = metadata.BytesStorageMetadata()
        place(metadata.MetadataIndex(name), value)
        paths[name] = tuple(name.split("."))
    for file, content in files.items():
        (folder / file).write_bytes(content)
    found = metadata.Metadata(described, paths, places)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    return found


MATRIX = filled(24, 10)
CUBE = torch.arange(120, dtype=torch.bfloat16).view(4, 6, 5)
STATE = {
    "m.rows": (MATRIX, cut((24, 10), (7, 1, 16), (10,))),
    "m.grid": (MATRIX + 1, cut((24, 10), (12, 12), (3, 3, 4))),
    "cube": (CUBE, cut((4, 6, 5), (1, 3), (6,), (2, 3))),
    "scalar": (torch.tensor(2.5), [((), ())]),
    "whole": (filled(9, dtype=torch.int64), [((0,), (9,))]),
    "empty": (torch.empty(0, 3), [((0, 0), (0, 3))]),
}
VALUES = {"step": 7, "opt.groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], "sparse": torch.eye(3).to_sparse()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "dcp", STATE, VALUES)
    return tmp_path / "dcp"


def nested():
    found = {"m": {}, "opt": {"groups": VALUES["opt.groups"]}}
    for name, (tensor, _) in STATE.items():
        found["m" if name.startswith("m.") else name] = (
            {**found["m"], name[2:]: tensor} if name.startswith("m.") else tensor
        )
    return {**found, "step": 7, "sparse": VALUES["sparse"]}


def test_the_folder_of_these_tests_is_one_of_dcp(folder):
    found = {name: torch.zeros_like(tensor) for name, (tensor, _) in STATE.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, (tensor, _) in STATE.items())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("named", ["", ".metadata"])
def test_load(named, verify, folder, backend):
    told = []
    found = sio.load(folder / named, verify=verify, backend=backend, progress=lambda *numbers: told.append(numbers))
    assert difference(found, {name: found[name] for name in found}) is None
    expected = nested()
    assert found.keys() == expected.keys() and found["m"].keys() == expected["m"].keys()
    assert difference(found, {name: expected[name] for name in found}) is None
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_load_onto_a_device(folder, backend):
    found = sio.load(folder, "meta", backend=backend)
    assert {found["m"]["grid"].device.type, found["whole"].device.type} == {"meta"}
    assert found["m"]["grid"].shape == (24, 10)


def test_open_checkpoint(folder, backend, capsys):
    with sio.open_checkpoint(folder, backend=backend) as ckpt:
        assert [*ckpt] == [*STATE, "sparse"] and sorted(ckpt.others) == [
            "opt.groups.0.betas.0", "opt.groups.0.betas.1", "opt.groups.0.lr", "step",
        ]  # fmt: skip
        for name, (tensor, boxes) in STATE.items():
            info = ckpt.info(name)
            assert (info.shape, info.dtype, info.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
            assert info.path == (str(folder / ".metadata") if len(boxes) > 1 else info.path)
            assert torch.equal(ckpt[name], tensor) and ckpt.is_plain(name)
        assert torch.equal(ckpt["sparse"].to_dense(), torch.eye(3)) and not ckpt.is_plain("sparse")
        with pytest.raises(KeyError):
            ckpt["m"]
    with pytest.raises(ValueError, match="closed"):
        ckpt["cube"]
    assert main(["inspect", "--json", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == {"kind": "torch.distributed.checkpoint", "files": 3, "parts": 19}
    assert found["values"]["step"] == "7"


def some_index(size, chance):
    begin, end = sorted(chance.choices(range(size + 1), k=2))
    step = chance.choice([1, 1, 1, 2, 3])
    return chance.choice([slice(begin, end, step), slice(None), slice(begin, None), chance.randrange(size)])


def test_slices(folder, backend):
    chance = random.Random(0)
    with sio.open_checkpoint(folder, backend=backend) as ckpt:
        for name in ("m.rows", "m.grid", "cube"):
            tensor, part = STATE[name][0], ckpt.get_slice(name)
            for _ in range(60):
                index = tuple(some_index(size, chance) for size in tensor.shape[: chance.randint(1, tensor.dim())])
                assert torch.equal(part[index], tensor[index]), (name, index)
            for nbytes in (16, 40, 400, 10**6):
                blocks = [block.flatten() for block in ckpt.blocks(name, nbytes)]
                assert torch.equal(torch.cat(blocks), tensor.flatten()) and all(b.nbytes <= nbytes for b in blocks)
        assert torch.equal(ckpt.get_slice("sparse")[1].to_dense(), torch.eye(3)[1])


def test_a_slice_reads_the_parts_that_have_it(tmp_path, backend):
    """Not those of other ranks: they need not even be there."""
    write(tmp_path / "dcp", {"w": (MATRIX, cut((24, 10), (8, 8, 8), (10,)))})
    (tmp_path / "dcp" / "__2_0.distcp").unlink()
    with sio.open_checkpoint(tmp_path / "dcp", backend=backend) as ckpt:
        assert torch.equal(ckpt.get_slice("w")[3:16], MATRIX[3:16])
        with pytest.raises(FileNotFoundError, match="__2_0"):
            ckpt.get_slice("w")[3:17]


def test_diff_and_conversions(folder, tmp_path, backend):
    torch.save(nested(), tmp_path / "same.pt")
    assert sio.diff(folder, tmp_path / "same.pt", backend=backend).equal
    assert main(["diff", str(folder), str(tmp_path / "same.pt")]) == 0
    assert main(["convert", str(folder), str(tmp_path / "new.pt")]) == 0
    found = sio.load(tmp_path / "new.pt", backend=backend)
    assert difference(found, {name: nested()[name] for name in found}) is None and len(found) == len(nested())


@pytest.mark.parametrize("source", ["a sparse tensor", "one in a list"])
def test_a_sparse_tensor_is_not_lost(source, tmp_path, capsys):
    sparse = torch.eye(3).to_sparse()
    torch.save({"s": sparse if source == "a sparse tensor" else {1: [sparse]}}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), f"{tmp_path}/dcp/"]) == 2
    assert "load it with torch.load" in capsys.readouterr().err and not (tmp_path / "dcp").exists()


def test_verify(folder, backend, capsys):
    report = sio.verify(folder, backend=backend)
    assert report.ok and report.checksums == "crc32" and {record.status for record in report.records} == {"ok"}
    assert "m.rows at [7, 0]:data/0" in [record.name for record in report.records]
    assert main(["verify", str(folder)]) == 0
    data = bytearray((folder / "__1_0.distcp").read_bytes())
    at = data.index(MATRIX[7].numpy().tobytes())
    data[at] ^= 1
    (folder / "__1_0.distcp").write_bytes(data)
    report = sio.verify(folder, backend=backend)
    (problem,) = report.problems
    assert "m.rows at [7, 0]" in problem and "__1_0.distcp" in problem
    assert [r.name for r in report.records if r.status == "corrupt"] == ["m.rows at [7, 0]:data/0"]
    with pytest.raises(sio.CorruptCheckpointError, match=r"m\.rows at \[7, 0\]"):
        sio.load(folder, verify=True, backend=backend)
    (folder / "__1_0.distcp").unlink()
    assert any("is missing" in problem for problem in sio.verify(folder, backend=backend).problems)
    assert main(["verify", str(folder)]) == 1


def change(found, name, **options):
    found.state_dict_metadata[name] = dataclasses.replace(found.state_dict_metadata[name], **options)


def with_chunks(name, boxes):
    def do(found):
        chunks = [metadata.ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
        first = next(info for index, info in found.storage_data.items() if index.fqn == name)
        found.storage_data |= {
            metadata.MetadataIndex(name, torch.Size(at)): dataclasses.replace(first, length=10**6) for at, _ in boxes
        }
        change(found, name, chunks=chunks)

    return do


def with_place(name, **options):
    def do(found):
        for index, info in found.storage_data.items():
            if index.fqn == name:
                found.storage_data[index] = dataclasses.replace(info, **options)

    return do


HOSTILE = {
    "a gap": with_chunks("whole", [((0,), (8,))]),
    "an overlap": with_chunks("whole", [((0,), (5,)), ((3,), (4,))]),
    "beyond the tensor": with_chunks("whole", [((4,), (9,))]),
    "of too few dimensions": with_chunks("m.rows", [((0,), (24,))]),
    "of another shape": lambda found: change(found, "m.rows", size=torch.Size([240])),
    "a huge tensor": lambda found: change(found, "whole", size=torch.Size([1 << 40])),
    "of another dtype": lambda found: change(found, "whole", properties=metadata.TensorProperties(dtype=torch.double)),
    "another tensor's part": with_place("whole", relative_path="__0_0.distcp", offset=0),
    "beyond the file": with_place("whole", offset=10**9),
    "before the file": with_place("whole", offset=-5),
    "no number": with_place("whole", offset="5"),
    "outside": with_place("whole", relative_path="../x"),
    "a place inside another": lambda found: found.planner_data.__setitem__("whole", ("m", "rows", "x")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_sound_is_named(what, tmp_path, backend):
    found = write(tmp_path / "dcp", STATE, VALUES)
    HOSTILE[what](found)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(sio.StateDictIOError, match=r"whole|m\.rows|metadata"):
        sio.load(tmp_path / "dcp", backend=backend)
    if what != "a place inside another":
        with pytest.raises(sio.CorruptCheckpointError), sio.open_checkpoint(tmp_path / "dcp", backend=backend) as ckpt:
            ckpt["whole"], ckpt["m.rows"]


def test_parts_that_share_their_bytes(tmp_path, backend):
    """A small directory is not loaded into gigabytes."""
    tensor = torch.zeros(1 << 20)
    found = write(tmp_path / "dcp", {"w0": (tensor, [((0,), (1 << 20,))])})
    for name in (f"w{i}" for i in range(1, 200)):
        found.state_dict_metadata[name] = found.state_dict_metadata["w0"]
        found.storage_data[metadata.MetadataIndex(name, torch.Size([0]))] = next(iter(found.storage_data.values()))
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(found))
    for read in (sio.load, sio.open_checkpoint):
        with pytest.raises(sio.CorruptCheckpointError, match="many more than its files"):
            read(tmp_path / "dcp", backend=backend)


class Foreign:
    pass


def test_what_is_refused_is_named(tmp_path, backend):
    write(tmp_path / "dcp", {"w": (MATRIX, [((0, 0), (24, 10))])}, {"config": Foreign()})
    with sio.open_checkpoint(tmp_path / "dcp", backend=backend) as ckpt:
        assert torch.equal(ckpt["w"], MATRIX)
        assert ckpt.refused == {"config": (f"{__name__}.Foreign",)}
        with pytest.raises(KeyError, match="Foreign"):
            ckpt["config"]
    with pytest.raises(pickle.UnpicklingError, match="Foreign"):
        sio.load(tmp_path / "dcp", backend=backend)
    assert type(sio.load(tmp_path / "dcp", weights_only=False, backend=backend)["config"]) is Foreign
    with sio.open_checkpoint(tmp_path / "dcp", weights_only=False, backend=backend) as ckpt:
        assert type(dict(ckpt.other_values())["config"]) is Foreign
    assert sio.verify(tmp_path / "dcp", backend=backend).ok


def test_extensions_are_refused(tmp_path, backend):
    found = write(tmp_path / "dcp", {"w": (MATRIX, [((0, 0), (24, 10))])})
    index, info = next(iter(found.storage_data.items()))
    if "transform_descriptors" not in {field.name for field in dataclasses.fields(info)}:
        pytest.skip("this torch has none")
    found.storage_data[index] = dataclasses.replace(info, transform_descriptors=["zstd"])
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(sio.StateDictIOError, match=r"zstd; load it with torch\.distributed"):
        sio.load(tmp_path / "dcp", backend=backend)


def test_at_a_url(folder, backend):
    require_package("fsspec")
    import fsspec

    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe(f"/dcp/run/{path.name}", path.read_bytes())
    url = "memory://dcp/run/"
    assert torch.equal(sio.load(url, backend=backend)["m"]["grid"], MATRIX + 1)
    with sio.open_checkpoint(url, backend=backend) as ckpt:
        assert torch.equal(ckpt.get_slice("cube")[1:, 3], CUBE[1:, 3])
    assert sio.verify(url, backend=backend).ok


def test_more_files_than_may_be_open(tmp_path, backend, monkeypatch):
    from statedict_io.reading import dcp_folder

    monkeypatch.setattr(dcp_folder, "_MAX_OPEN", 1)
    write(tmp_path / "dcp", STATE)
    with sio.open_checkpoint(tmp_path / "dcp", backend=backend) as ckpt:
        for _, (name, (tensor, _)) in itertools.product(range(2), STATE.items()):
            assert torch.equal(ckpt[name], tensor) and math.prod(tensor.shape) == tensor.numel()
