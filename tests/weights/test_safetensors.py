"""Safetensors files, read by everything that reads: what the safetensors package reads, and no more than is needed."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from corpus_case import filled, random_bytes
from equality import difference
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.formats.safetensors_format import NAMES

package = pytest.importorskip("safetensors.torch")

SMALL = {
    **{f"a {dtype}": filled(7, 5, dtype=dtype) for dtype in NAMES if dtype != torch.float8_e8m0fnu},
    "scalar": filled(1)[0],
    "none": filled(0, 3),
    "none at all": torch.empty(0),
}
# Of several spans, with small ones between; none ends at a multiple of 16.
LARGE = {
    **{f"l{i}": random_bytes((9 << 20) + 4 + 2 * i, seed=i).view(torch.bfloat16) for i in range(3)},
    **{f"s{i}": random_bytes(1000 + 2 * i, seed=i).view(torch.bfloat16) for i in range(200)},
    "bytes": random_bytes((1 << 20) + 1),
    "doubles": random_bytes(64 << 10).view(torch.float64),
}


@pytest.fixture(params=["small", "large"])
def tensors(request):
    return {"small": SMALL, "large": LARGE}[request.param]


@pytest.fixture
def path(tensors, tmp_path):
    package.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "x"})
    return tmp_path / "model.safetensors"


def misaligned(path, *, nbytes=(1 << 20)):
    """A file whose tensors begin at odd bytes, as save_file writes none."""
    tensors = {"a": random_bytes(3), "b": random_bytes(nbytes).view(torch.float32), "c": random_bytes(nbytes, seed=1)}
    tensors |= {"d": random_bytes(2 * nbytes, seed=2).view(torch.int64), "e": torch.tensor(2.5)}
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tensors


def in_order(found, tensors):
    """A dict in the order of another, for comparing."""
    assert found.keys() == tensors.keys()
    return {name: found[name] for name in tensors}


def test_load_is_what_the_package_loads(path, tensors, backend):
    found = sio.load(path, backend=backend)
    assert difference(in_order(package.load_file(path), tensors), in_order(found, tensors)) is None
    assert difference(tensors, in_order(found, tensors)) is None
    assert not any(tensor.untyped_storage().resizable() for tensor in found.values())
    for location in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, _: storage):
        found = sio.load(path, location, backend=backend)
        assert difference(tensors, in_order(found, tensors)) is None


def test_load_under_any_name(path, tensors, backend):
    path = path.rename(path.with_suffix(".bin"))
    assert difference(tensors, in_order(sio.load(path, backend=backend), tensors)) is None


def test_load_onto_meta_reads_nothing(path, tensors, backend):
    found = sio.load(path, "meta", backend=backend)
    assert {name: (t.dtype, t.shape, t.device.type) for name, t in found.items()} == {
        name: (t.dtype, t.shape, "meta") for name, t in tensors.items()
    }


def test_tensors_may_be_written_to_and_do_not_share_memory(path, tensors, backend):
    found = sio.load(path, backend=backend)
    for tensor in found.values():
        tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).zero_()
    again = sio.load(path, backend=backend)
    assert difference(tensors, in_order(again, tensors)) is None


def test_misaligned_tensors(backend, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = misaligned(path)
    assert difference(tensors, sio.load(path, backend=backend)) is None
    found = sio.load(path, backend=backend)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert difference(tensors, dict(ckpt)) is None
        assert torch.equal(ckpt.get_slice("d")[10:20:3], tensors["d"][10:20:3])


def test_open_checkpoint(path, tensors, backend):
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        assert difference(tensors, in_order(dict(ckpt), tensors)) is None
        data = path.read_bytes()
        for name, tensor in tensors.items():
            info = ckpt.info(name)
            assert (info.shape, info.dtype, info.path) == (tensor.shape, tensor.dtype, str(path))
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert data[info.offset : info.offset + info.nbytes] == content
        assert ckpt.metadata == {"format": "pt", "note": "x"}
        assert (list(ckpt.others), list(ckpt.hidden), ckpt.refused) == ([], [], {})
        with pytest.raises(KeyError):
            ckpt["missing"]
    with pytest.raises(ValueError, match="closed"):
        ckpt[next(iter(tensors))]


@pytest.mark.parametrize("index", [slice(2, 5), (slice(None), 3), (Ellipsis, slice(0, 5, 2)), -1, (None, slice(1, 2))])
def test_slices(index, backend, tmp_path):
    tensor = filled(7, 5)
    package.save_file({"x": filled(3, dtype=torch.uint8), "w": tensor}, tmp_path / "m.safetensors")
    with sio.open_checkpoint(tmp_path / "m.safetensors", backend=backend) as ckpt:
        found = ckpt.get_slice("w")[index]
        assert torch.equal(found, tensor[index]) and found.is_contiguous()


def test_a_file_that_is_replaced_is_read_to_its_end(path, tensors, backend):
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        package.save_file({"other": filled(3)}, path.with_name("new"))
        os.replace(path.with_name("new"), path)
        assert difference(tensors, in_order(dict(ckpt), tensors)) is None


def test_a_file_that_is_cut_off_meanwhile(path, tensors, backend):
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(sio.CorruptCheckpointError, match=r"model\.safetensors"):
            dict(ckpt)


def test_progress(backend, tmp_path):
    package.save_file(LARGE, tmp_path / "m.safetensors")
    seen = []
    sio.load(tmp_path / "m.safetensors", backend=backend, progress=lambda *done: seen.append(done))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] >= sum(t.nbytes for t in LARGE.values())


def test_urls(path, tensors, backend):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/weights/model.safetensors", path.read_bytes())
    for url in ("memory://weights/model.safetensors", f"file://{path}"):
        assert difference(tensors, in_order(sio.load(url, backend=backend), tensors)) is None
        with sio.open_checkpoint(url, backend=backend) as ckpt:
            assert difference(tensors, in_order(dict(ckpt), tensors)) is None
        assert sio.verify(url, backend=backend).ok


def test_inspect(path, tensors, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {t["name"]: (t["dtype"], t["shape"]) for t in found["tensors"]} == {
        name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()
    }
    assert found["format"]["kind"] == "safetensors" and found["format"]["metadata"] == {"format": "pt", "note": "x"}
    assert found["file_nbytes"] == path.stat().st_size
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "safetensors" in out and "note" in out and f"{len(tensors)} tensors" in out


def test_verify_without_checksums(path, tensors, backend, capsys):
    report = sio.verify(path, backend=backend)
    assert report.ok and report.checksums == "none"
    assert {r.name: r.nbytes for r in report.records} == {name: t.nbytes for name, t in tensors.items()}
    assert {r.status for r in report.records} == {"no-checksums"}
    assert main(["verify", str(path)]) == 0 and "no checksums" in capsys.readouterr().out
    assert main(["verify", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["checksums"] == "none"


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def sidecars(path):
    """What says the SHA-256: (name -> content)."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    other = f"{'0' * 64}  other.bin\n"
    return {
        "own": (f"{path.name}.sha256", f"{sha256}  {path.name}\n"),
        "own, binary": (f"{path.name}.sha256", f"{sha256} *{path.name}\n"),
        "own, alone": (f"{path.name}.sha256", sha256.upper()),
        "own, tagged": (f"{path.name}.sha256", f"SHA256 ({path.name}) = {sha256}\n"),
        "sums": ("SHA256SUMS", f"{other}{sha256}  ./{path.name}\n"),
        "hub": (
            f".cache/huggingface/download/{path.name}.metadata",
            f"{'a' * 40}\n{sha256}\n{path.stat().st_mtime + 5}\n",
        ),
    }


@pytest.mark.parametrize("form", ["own", "own, binary", "own, alone", "own, tagged", "sums", "hub"])
def test_verify_against_a_sidecar(form, backend, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    package.save_file(SMALL, path)
    name, content = sidecars(path)[form]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    report = sio.verify(path, backend=backend)
    assert report.ok and report.checksums == "sha256" and {r.status for r in report.records} == {"ok"}
    assert main(["verify", str(path)]) == 0
    flip_last_byte(path)
    report = sio.verify(path, backend=backend)
    (problem,) = report.problems
    assert not report.ok and str(path) in problem and os.path.basename(name) in problem
    assert main(["verify", str(path)]) == 1
    assert problem in capsys.readouterr().out


def test_a_sidecar_with_a_name_that_is_escaped(backend, tmp_path):
    path = tmp_path / "a\\b\nc.safetensors"
    package.save_file(SMALL, tmp_path / "plain")
    (tmp_path / "plain").rename(path)
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    sums = subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "SHA256SUMS").write_bytes(sums)
    assert sums.startswith(b"\\") and sio.verify(path, backend=backend).checksums == "sha256"
    flip_last_byte(path)
    assert not sio.verify(path, backend=backend).ok


def test_the_cache_of_the_hub(backend, tmp_path):
    package.save_file(SMALL, tmp_path / "plain")
    sha256 = hashlib.sha256((tmp_path / "plain").read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "plain").rename(tmp_path / "blobs" / sha256)
    path = tmp_path / "snapshots" / "model.safetensors"
    path.symlink_to(tmp_path / "blobs" / sha256)
    assert sio.verify(path, backend=backend).checksums == "sha256"
    flip_last_byte(tmp_path / "blobs" / sha256)
    assert not sio.verify(path, backend=backend).ok


def test_sidecars_that_say_nothing(backend, tmp_path):
    path = tmp_path / "model.safetensors"
    package.save_file(SMALL, path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\nnonsense\n")
    old = tmp_path / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    old.parent.mkdir(parents=True)
    old.write_text(f"{'a' * 40}\n{'0' * 64}\n{path.stat().st_mtime - 100}\n")  # of the file before this one
    assert sio.verify(path, backend=backend).checksums == "none"
    (tmp_path / "model.safetensors.sha256").write_text(f"{'0' * 64}  other.safetensors\n")
    report = sio.verify(path, backend=backend)
    assert not report.ok and "model.safetensors.sha256" in report.problems[0]


def test_convert_is_what_the_package_and_torch_make(path, tensors, tmp_path, capsys):
    assert main(["convert", str(path), str(tmp_path / "new.pt")]) == 0
    (tmp_path / "ref").mkdir()
    reference = package.load_file(path)
    with sio.open_checkpoint(path) as ckpt:
        torch.save({name: reference[name] for name in ckpt}, tmp_path / "ref" / "new.pt")
    assert (tmp_path / "new.pt").read_bytes() == (tmp_path / "ref" / "new.pt").read_bytes()
    assert "note" in capsys.readouterr().err
    assert names_in(tmp_path) == ["model.safetensors", "new.pt", "ref"]
