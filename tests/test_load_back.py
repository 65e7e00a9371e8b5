"""Plain torch.load and unzip accept the files; sharing survives. Bytes are compared in test_byte_identity.py."""

import io
import shutil
import subprocess
import zipfile

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from equality import difference
from oracle import assert_same_file, attempt

import statedict_io as sio

pytestmark = pytest.mark.filterwarnings("ignore")

# What weights-only loading accepts, and `difference` compares with the object that was saved.
PLAIN = [
    "top_level_tensor", "top_level_scalar_tensor", "non_contiguous_views", "channels_last", "expanded",
    "tied_and_overlapping",
    "conjugate_and_negative_views", "special_floats", "small_view_of_a_huge_storage", "around_the_alignment",
    "many_small",
    "larger_than_one_region", "sparse_coo[torch.float32]", "sparse_compressed[csr]",
    "sparse_compressed[bsc]", "quantized_per_tensor[torch.qint8]", "quantized_per_channel[torch.quint8]",
    "nested_strided",
    "payloads_like_descriptors", "descriptor_signatures_inside_a_payload", "module_state_dict", "training_state[Adam]",
    "training_state[SGD]", "checkpoint_of_a_training_script", "metadata_on_an_ordered_dict",
    "two_storages_over_the_same_memory",
    "dtype[torch.float8_e4m3fn]", "dtype[torch.complex32]", "dtype[torch.uint16]", "dtype[torch.uint64]",
    "dtype[torch.bool]",
    "dtype[torch.bfloat16]", "dtype_zero_size[torch.float32]", "keys_shared_by_nested_dicts",
]  # fmt: skip


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_torch_load_returns_what_was_saved(name, mmap, backend, tmp_path):
    obj = CORPUS[name]()
    sio.save(obj, tmp_path / "model.pt", backend=backend)
    loaded, refusal = attempt(torch.load, tmp_path / "model.pt", weights_only=True, mmap=mmap)
    if refusal is not None:  # a release that loads no such thing: nor from its own file
        torch.save(obj, tmp_path / "model.pt")
        _, expected = attempt(torch.load, tmp_path / "model.pt", weights_only=True, mmap=mmap)
        assert (type(refusal), str(refusal)) == (type(expected), str(expected))
        return
    again = CORPUS[name]()
    assert difference(again, obj) is None, "the factory is not repeatable or the save changed the object"
    assert difference(obj, loaded) is None


@pytest.mark.parametrize("name", PLAIN)
def test_a_stream_loads_back(name, backend, tmp_path):
    with open(tmp_path / "f", "w+b") as file:
        obj = CORPUS[name]()
        sio.save(obj, file, backend=backend)
        file.seek(0)
        loaded, refusal = attempt(torch.load, file, weights_only=True)
        if refusal is None:
            assert difference(obj, loaded) is None
        else:  # a release that loads no such thing: nor from its own file
            stream = io.BytesIO()
            torch.save(obj, stream)
            stream.seek(0)
            _, expected = attempt(torch.load, stream, weights_only=True)
            assert (type(refusal), str(refusal)) == (type(expected), str(expected))


def test_tied_tensors_share_one_record_and_stay_tied(backend, tmp_path):
    base = filled(64)
    sio.save({"a": base, "b": base, "tail": base[32:]}, tmp_path / "model.pt", backend=backend)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert [name for name in archive.namelist() if "/data/" in name and ".data" not in name] == ["model/data/0"]
    loaded = torch.load(tmp_path / "model.pt")
    loaded["a"].fill_(1.0)
    loaded["tail"].fill_(2.0)
    assert loaded["b"].tolist() == [1.0] * 32 + [2.0] * 32


def test_a_small_view_keeps_its_whole_storage(backend, tmp_path):
    huge = filled(1 << 20)
    sio.save(huge[5:8], tmp_path / "model.pt", backend=backend)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.getinfo("model/data/0").file_size == huge.nbytes


def test_meta_tensors_have_no_record(backend, tmp_path):
    sio.save({"a": torch.empty(1000, device="meta")}, tmp_path / "model.pt", backend=backend)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert not [name for name in archive.namelist() if name.startswith("model/data/")]


@pytest.mark.parametrize("mmap", [False, True])
def test_a_loaded_checkpoint_is_saved_as_torch_saves_it(mmap, backend, tmp_path):
    torch.save(CORPUS["module_state_dict"](), tmp_path / "first.pt")
    assert assert_same_file(tmp_path, torch.load(tmp_path / "first.pt", mmap=mmap), backend) is None


@pytest.mark.skipif(shutil.which("unzip") is None, reason="no unzip here")
@pytest.mark.parametrize("name", [*PLAIN, "module", "storages", "numpy_objects", "containers"])
def test_unzip_finds_no_error(name, backend, tmp_path):
    sio.save(CORPUS[name](), tmp_path / "model.pt", backend=backend)
    done = subprocess.run(["unzip", "-tqq", tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
