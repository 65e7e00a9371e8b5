"""How much is read and how much memory it takes, as tests/test_read_amounts.py counts it."""

import pytest
import torch
from corpus_case import random_bytes
from test_read_amounts import MIB, measured

package = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A matrix of 256 MiB and a few other tensors, as safetensors, legacy and zip."""
    path = tmp_path_factory.mktemp("large") / "large"
    tensors = {"matrix": random_bytes(256 * MIB).view(torch.float32).view(-1, 4096), "s": torch.rand(5)}
    package.save_file(tensors, f"{path}.safetensors")
    torch.save(tensors, f"{path}.pt")
    torch.save(tensors, f"{path}.pth", _use_new_zipfile_serialization=False)
    yield path
    for suffix in (".safetensors", ".pt", ".pth"):
        path.with_suffix(suffix).unlink()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    ("action", "at_most"),
    [
        ("c = sio.open_checkpoint(path, backend=backend); [c.info(n) for n in c]", 3 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend)['s'].shape == (5,)", 3 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend).get_slice('matrix')[64:128].nbytes == 2**20", 4 * MIB),
        ("assert 'matrix' in sio.open_checkpoint(path, backend=backend)", 3 * MIB),
        ("assert sio.verify(path, backend=backend).ok", 3 * MIB),
    ],
)
def test_only_what_is_needed_is_read(action, at_most, suffix, large, backend):
    if suffix == ".pt" and "verify" in action:
        pytest.skip("reads all")
    found = measured(action, large.with_suffix(suffix), backend)
    assert found["read"] <= at_most and found["extra"] <= 24 * MIB, found


@pytest.mark.parametrize(
    ("action", "kept"),
    [
        ("x = sio.load(path + '.safetensors', backend=backend)", 256 * MIB),
        ("assert sio.diff(path + '.safetensors', path + '.pth', backend=backend).equal", 0),
        ("assert sio.diff(path + '.safetensors', path + '.pt', backend=backend).equal", 0),
        ("convert(path + '.pth', path + '.new.pt')", 0),
        ("convert(path + '.pt', path + '.new.pt')", 0),
        ("convert(path + '.safetensors', path + '.new.safetensors')", 0),
        ("convert(path + '.pth', path + '.new.safetensors')", 0),
        ("convert(path + '.pt', path + '.set/', max_shard_nbytes=2**20, digest='sha256')", 0),
    ],
)
def test_memory_is_bounded(action, kept, large, backend):
    found = measured(action, large, backend, warm="sio.verify(path + '.small', backend=backend)")
    assert found["extra"] <= kept + 160 * MIB, found
