"""Files of torch before 1.6: the format that torch still writes when asked, and the tar archives before that."""

import io
import json
import pathlib
import pickle
import pickletools
import shutil
import struct
import tarfile

import pytest
import torch
from corpus_case import filled, random_bytes

import statedict_io as sio
from statedict_io.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FROZEN = pathlib.Path(__file__).parents[1] / "frozen" / "legacy.pt"


def base():
    return filled(400, 30)


def state():
    shared = base()
    return {
        "model": {"w": shared, "t": shared.t(), "part": shared[3:9, ::2], "half": filled(7, dtype=torch.bfloat16)},
        "large": random_bytes(9 << 20).view(torch.float32),
        "p": torch.nn.Parameter(filled(3)),
        "none": torch.empty(0, 2),
        "step": 7,
        "lr": [0.1, "x"],
    }


def same(expected, found):
    """Names, types, strides and bits of two dicts of tensors; not which share memory."""
    assert [*expected] == [*found]
    for name, tensor in expected.items():
        other = found[name]
        assert type(other) is type(tensor) and other.stride() == tensor.stride(), name
        assert other.dtype == tensor.dtype and torch.equal(bits(other), bits(tensor)), name
    return True


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


@pytest.fixture
def path(tmp_path):
    torch.save(state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "old.pth"


def flat(obj, prefix=""):
    found = {}
    for key, value in obj.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + key] = value
    return found


def test_open_checkpoint(path, backend):
    expected = flat(torch.load(path))
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert same(expected, dict(ckpt))
        assert list(ckpt.others) == ["step", "lr.0", "lr.1"]
        assert torch.equal(bits(ckpt.get_slice("model.t")[:, 5:8]), bits(expected["model.t"][:, 5:8]))
        info, data = ckpt.info("large"), path.read_bytes()
        assert data[info.offset : info.offset + info.nbytes] == expected["large"].numpy().tobytes()
        assert ckpt.record("model.w") == ckpt.record("model.part") != ckpt.record("large")
    with pytest.raises(ValueError, match="closed"):
        ckpt["large"]


def test_a_frozen_file(backend):
    expected = torch.load(FROZEN)
    with sio.open_checkpoint(FROZEN, backend=backend) as ckpt:
        assert torch.equal(expected["model"]["w"], ckpt["model.w"])
    assert sio.verify(FROZEN, backend=backend).ok


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol, backend, tmp_path):
    obj = {"w": filled(30), "n": 5}
    torch.save(obj, tmp_path / "old.pth", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    with sio.open_checkpoint(tmp_path / "old.pth", backend=backend) as ckpt:
        assert torch.equal(ckpt["w"], obj["w"]) and list(ckpt.others) == ["n"]
    assert sio.verify(tmp_path / "old.pth", backend=backend).ok


class Foreign:
    def __init__(self):
        self.tensor = filled(3)


def test_what_the_restricted_unpickler_refuses(backend, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": filled(5), "config": Foreign()}, path, _use_new_zipfile_serialization=False)
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert torch.equal(ckpt["w"], filled(5)) and "Foreign" in ckpt.refused["config"][0]
    with sio.open_checkpoint(path, backend=backend, weights_only=False) as ckpt:
        assert torch.equal(ckpt["w"], filled(5)) and list(ckpt.others) == ["config"]
    torch.save(Foreign(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match=r"old\.pth: .*Foreign.*--trust"):
        sio.open_checkpoint(path, backend=backend)


def test_what_needs_data(backend, tmp_path):
    path = tmp_path / "old.pth"
    quantized = torch.quantize_per_tensor(filled(4), 0.1, 3, torch.qint8)
    obj = {"s": torch.eye(3).to_sparse(), "w": filled(5), "q": quantized}
    for names in (["s", "w"], ["q", "w"], ["s", "q", "w"]):
        part = {name: obj[name] for name in names}
        torch.save(part, path, _use_new_zipfile_serialization=False)
        with sio.open_checkpoint(path, backend=backend) as ckpt:
            assert list(ckpt) == names
            for name in names:
                assert ckpt[name].layout == part[name].layout and ckpt[name].is_quantized == part[name].is_quantized
                assert torch.equal(dense(ckpt[name]), dense(part[name]))


def dense(tensor):
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def test_verify(path, backend, capsys):
    report = sio.verify(path, backend=backend)
    assert report.ok and report.checksums == "none" and {r.status for r in report.records} == {"no-checksums"}
    assert sum(r.nbytes for r in report.records) == sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat(torch.load(path)).values()}.values()
    )
    assert main(["verify", str(path)]) == 0 and "no checksums" in capsys.readouterr().out
    (path.parent / "SHA256SUMS").write_text(f"{'0' * 64}  {path.name}\n")
    assert main(["verify", str(path)]) == 1


def test_inspect(path, capsys):
    assert main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"]["kind"] == "torch, legacy" and len(found["tensors"]) == 7


def test_cut_off_anywhere_it_is_damaged(backend, tmp_path):
    small = io.BytesIO()
    torch.save({"w": filled(30), "v": filled(3)}, small, _use_new_zipfile_serialization=False)
    data = small.getvalue()
    path = tmp_path / "old.pth"
    for nbytes in [*range(40, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:nbytes])
        with pytest.raises(sio.CorruptCheckpointError, match=r"old\.pth"):
            sio.open_checkpoint(path, backend=backend)
        assert not sio.verify(path, backend=backend).ok


def test_counts_that_say_otherwise(backend, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": filled(30)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    at = data.rindex(struct.pack("<q", 30))
    for count in (0, 29, 31, 1 << 62, -1):
        path.write_bytes(data[:at] + struct.pack("<q", count) + data[at + 8 :])
        with pytest.raises(sio.CorruptCheckpointError, match=r"old\.pth"):
            sio.open_checkpoint(path, backend=backend)
        assert not sio.verify(path, backend=backend).ok


def test_convert_to_safetensors(path, tmp_path, capsys):
    package = pytest.importorskip("safetensors.torch")
    assert main(["convert", str(path), str(tmp_path / "new.safetensors")]) == 0
    expected = {name: tensor.contiguous() for name, tensor in flat(torch.load(path)).items()}
    found = package.load_file(tmp_path / "new.safetensors")
    expected = {name: tensor.detach() for name, tensor in expected.items()}
    assert same(expected, {name: found[name] for name in expected})
    assert "step" in capsys.readouterr().err


def test_urls(path, backend):
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.pipe_file("/old/old.pth", path.read_bytes())
    with sio.open_checkpoint("memory://old/old.pth", backend=backend) as ckpt:
        assert same(flat(torch.load(path)), dict(ckpt))
    assert sio.verify("memory://old/old.pth", backend=backend).ok


def tar_of(tensors, path):
    """As torch before 0.1.10 wrote it; see torch.serialization._legacy_load."""
    storages, found, members = io.BytesIO(), io.BytesIO(), {}
    pickle.dump(len(tensors), storages, 2)
    pickle.dump(len(tensors), found, 2)
    for key, tensor in enumerate(tensors.values()):
        pickle.dump((key, "cpu", torch.FloatStorage), storages, 2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((100 + key, key, "torch.FloatTensor"), found, 2)
        found.write(struct.pack("<ii", tensor.dim(), 0))
        for numbers in (tensor.shape, tensor.stride()):
            found.write(struct.pack(f"<{tensor.dim()}q", *numbers))
        found.write(struct.pack("<q", 0))
    pickle.dump([], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return str(100 + list(tensors).index(obj.name)) if isinstance(obj, Named) else None

    named = io.BytesIO()
    Pickler(named, 2).dump({name: Named(name) for name in tensors})
    members = {"storages": storages, "tensors": found, "pickle": named}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)


class Named:
    def __init__(self, name):
        self.name = name


def test_tar(backend, tmp_path, capsys):
    path = tmp_path / "ancient.pth"
    tensors = {"w": filled(4, 5), "b": filled(3)}
    tar_of(tensors, path)
    assert same(tensors, torch.load(path, weights_only=False))
    with sio.open_checkpoint(path, backend=backend, weights_only=False) as ckpt:
        assert same(tensors, dict(ckpt))
        assert torch.equal(ckpt.get_slice("w")[1:3], tensors["w"][1:3])
    with pytest.raises(pickle.UnpicklingError, match=r"ancient\.pth: .*tar archive.*--trust"):
        sio.open_checkpoint(path, backend=backend)
    report = sio.verify(path, backend=backend)
    assert report.ok and [r.name for r in report.records] == ["storages", "tensors", "pickle"]
    assert main(["convert", "--trust", str(path), str(tmp_path / "new.safetensors")]) == 0
    assert main(["inspect", str(path)]) == 2 and "tar archive" in capsys.readouterr().err
    data = path.read_bytes()
    path.write_bytes(data[:700])
    assert not sio.verify(path, backend=backend).ok
    shutil.rmtree(tmp_path)


def in_python_2(path):
    """The file as Python 2 would have written it: texts are strings of bytes."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    written = bytearray()
    for _ in range(5):
        begin = stream.tell()
        found = [(opcode.name, value, begin + at) for opcode, value, at in pickletools.genops(data[begin:])]
        ends = [*(at for _, _, at in found[1:]), found[-1][2] + 1]
        for (name, value, at), end in zip(found, ends, strict=True):
            is_text = name == "BINUNICODE"
            written += b"U" + bytes([len(value)]) + value.encode() if is_text else data[at:end]
        stream.seek(ends[-1])
    path.write_bytes(written + stream.read())


def test_a_file_of_python_2(backend, tmp_path):
    """Published weights from before 2020 are such files; verify called them damaged."""
    path = tmp_path / "model.pth"
    torch.save({"w": torch.arange(6.0), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    in_python_2(path)
    assert b"U\x01w" in path.read_bytes() and torch.equal(torch.load(path)["w"], torch.arange(6.0))
    report = sio.verify(path, backend=backend)
    assert report.ok and len(report.records) == 2
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert [*ckpt] == ["w", "b"] and torch.equal(ckpt.get_slice("w")[2:4], torch.tensor([2.0, 3.0]))
    path.write_bytes(path.read_bytes()[:-3])
    assert not sio.verify(path, backend=backend).ok
