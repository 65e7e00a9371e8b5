"""What statedict_io.save writes is byte for byte what torch.save writes; see also test_torch_settings.py."""

import pickle
import types

import pytest
import torch
from corpus import CORPUS
from corpus_case import filled
from oracle import assert_same_error, assert_same_file, attempt, names_in, two_directories

import statedict_io as sio

pytestmark = pytest.mark.filterwarnings("ignore")

# Small objects that between them use most opcodes of a pickler.
VARIED = [
    "module", "module_state_dict", "training_state[Adam]", "storages", "shared_objects_and_cycles", "parameters",
    "containers", "long_strings_and_bytes", "scalars_of_every_size", "sparse_coo[torch.float32]",
    "storages_made_while_pickling",
    "library_objects", "keys_that_are_not_strings", "batches[1001]", "tensor_subclasses", "numpy_objects",
    "top_level[1]",
    "more_than_256_memo_entries", "top_level_untyped_storage", "metadata_on_an_ordered_dict", "object_with_slots",
]  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_every_object_is_written_as_torch_writes_it(name, backend, tmp_path):
    assert_same_file(tmp_path, CORPUS[name](), backend)


@pytest.mark.parametrize("protocol", [-1, 0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", VARIED)
def test_pickle_protocols(name, protocol, backend, tmp_path):
    assert_same_file(tmp_path, CORPUS[name](), backend, pickle_protocol=protocol, durable=(False,))


def test_a_protocol_given_by_position(backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    obj = CORPUS["module_state_dict"]()
    torch.save(obj, ref / "m.pt", pickle, 4)
    sio.save(obj, ours / "m.pt", pickle, 4, backend=backend)
    assert (ours / "m.pt").read_bytes() == (ref / "m.pt").read_bytes()


def test_a_protocol_past_the_last_is_refused_and_nothing_is_created(backend, tmp_path):
    reference = assert_same_file(tmp_path, {"a": filled(3)}, backend, pickle_protocol=6)
    assert isinstance(reference, ValueError)


class _PickledDifferently(pickle.Pickler):
    """A pickler with a reduction of its own."""

    def reducer_override(self, obj):
        if isinstance(obj, complex):
            return complex, (str(obj),)
        return NotImplemented


def _pickle_module(name):
    if name == "subclass of pickle.Pickler":
        return types.SimpleNamespace(Pickler=_PickledDifferently, __name__="custom")
    if name == "pickler in Python":
        return types.SimpleNamespace(Pickler=pickle._Pickler, __name__="custom")
    return pytest.importorskip(name)


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("module", ["dill", "cloudpickle", "pickler in Python", "subclass of pickle.Pickler"])
def test_pickle_modules(module, name, backend, tmp_path):
    obj = [1 + 2j, CORPUS[name]()]
    assert_same_file(tmp_path, obj, backend, pickle_module=_pickle_module(module), durable=(False,))


@pytest.mark.parametrize("module", ["dill", "cloudpickle"])
def test_functions_that_only_these_modules_pickle(module, backend, tmp_path):
    scale = filled(3)
    obj = {"closure": lambda x: x * scale, "scale": scale}
    reference = assert_same_file(tmp_path, obj, backend, pickle_module=pytest.importorskip(module), load=False)
    assert reference is None, "torch.save refused: this test compares nothing"


def two_dtypes_over_one_memory():
    tensor = filled(8)
    return {
        "tensors": {"a": tensor, "b": tensor.view(torch.int32)},
        "tensor and untyped storage": [tensor, tensor.untyped_storage()],
        "two storages": [tensor, torch.from_numpy(tensor.numpy().view("int32"))],
        "far apart": {
            "a": tensor,
            **{str(i): filled(2, seed=i) for i in range(50)},
            "b": [{"deep": tensor.view(torch.int16)}],
        },
    }


@pytest.mark.parametrize("name", ["tensors", "tensor and untyped storage", "two storages", "far apart"])
def test_one_memory_under_two_dtypes_is_refused_before_the_target_is_touched(name, backend, tmp_path):
    obj = two_dtypes_over_one_memory()[name]
    reference = assert_same_file(tmp_path, obj, backend)
    assert isinstance(reference, RuntimeError)
    path = tmp_path / "ours" / "model.pt"
    path.write_bytes(b"the old checkpoint")
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        sio.save(obj, path, backend=backend)
    assert path.read_bytes() == b"the old checkpoint"
    assert names_in(path.parent) == ["model.pt"]


class _RaisesWhenPickled:
    def __reduce__(self):
        raise KeyError("from __reduce__")


class _InterruptsWhenPickled:
    def __reduce__(self):
        raise KeyboardInterrupt


UNPICKLABLE = {
    "lambda": lambda: lambda: 0,
    "generator": lambda: (i for i in range(3)),
    "lock": lambda: __import__("threading").Lock(),
    "local class": lambda: type("Local", (), {})(),
    "module": lambda: pickle,
    "open file": lambda: open(__file__, "rb"),  # noqa: SIM115
    "raises": _RaisesWhenPickled,
    "memoryview": lambda: memoryview(b"abc"),
}


@pytest.mark.parametrize("name", UNPICKLABLE)
def test_an_unpicklable_object_creates_nothing_and_keeps_the_old_file(name, backend, tmp_path):
    obj = {"weight": filled(1000), "bad": UNPICKLABLE[name](), "after": filled(10)}
    reference = assert_same_file(tmp_path, obj, backend)
    assert reference is not None, "torch.save saved it: this test compares nothing"
    path = tmp_path / "ours" / "model.pt"
    path.write_bytes(b"the old checkpoint")
    _, error = attempt(lambda: sio.save(obj, path, backend=backend))
    assert_same_error(error, reference)
    assert path.read_bytes() == b"the old checkpoint"
    assert names_in(path.parent) == ["model.pt"]


def test_an_interrupt_while_pickling_keeps_the_old_file(backend, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old checkpoint")
    with pytest.raises(KeyboardInterrupt):
        sio.save([filled(10), _InterruptsWhenPickled()], path, backend=backend)
    assert path.read_bytes() == b"the old checkpoint"
    assert names_in(tmp_path) == ["model.pt"]


def test_an_overwrite_by_a_smaller_object_leaves_no_old_tail(backend, tmp_path):
    _, ours = two_directories(tmp_path)
    sio.save({"large": filled(100_000)}, ours / "model.pt", backend=backend)
    assert_same_file(tmp_path, {"small": filled(3)}, backend)


def test_saving_changes_nothing_about_the_object(backend, tmp_path):
    tensor = filled(100)
    before, storage = tensor.clone(), tensor.untyped_storage()._cdata
    sio.save({"a": tensor, "view": tensor[3:]}, tmp_path / "model.pt", backend=backend)
    assert tensor.untyped_storage()._cdata == storage
    assert torch.equal(tensor.view(torch.int32), before.view(torch.int32))


def test_save_returns_none(backend, tmp_path):
    assert sio.save({}, tmp_path / "model.pt", backend=backend) is None
