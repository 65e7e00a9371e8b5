"""open_checkpoint: tensors inside and beside other objects, made when they are asked for and not before."""

import builtins

import pytest
import torch
from conftest import require_native
from corpus_case import filled
from equality import difference
from flat_tensors import deferred, flat, values_of

import statedict_io as sio
from statedict_io.pickles import unpickling


def is_half(value):
    """For a file: a function that looks at what it is given."""
    return {"half": value[::2]} if isinstance(value, torch.Tensor) else "no tensor"


class AsksForItsKind:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return is_half, (self.value,)


def test_a_function_that_the_user_allows_is_given_tensors(backend, tmp_path):
    torch.save({"a": filled(8), "b": filled(9), "x": AsksForItsKind(filled(10))}, tmp_path / "model.pt")
    with torch.serialization.safe_globals([is_half]):
        expected = dict(flat(torch.load(tmp_path / "model.pt")))
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            assert set(checkpoint) == set(expected) == {"a", "b", "x.half"}
            for name, tensor in expected.items():
                assert difference(values_of(tensor), values_of(checkpoint[name])) is None


class OfOneTensor:
    """Pickled with a tensor as its only argument, and one as its state."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        return OfOneTensor, (self.tensor,), self.tensor + 1

    def __setstate__(self, state):
        self.state = state


def test_a_class_that_the_user_allows_is_given_large_tensors(backend, tmp_path):
    large = torch.arange(100_000.0)
    torch.save({"a": filled(8), "x": OfOneTensor(large)}, tmp_path / "model.pt")
    with torch.serialization.safe_globals([OfOneTensor]):
        found = sio.load(tmp_path / "model.pt", backend=backend)["x"]
        assert torch.equal(found.tensor, large) and torch.equal(found.state, large + 1)
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            assert list(checkpoint) == ["a"] and list(checkpoint.others) == ["x"]
            assert list(checkpoint.hidden) == ["'x' is a OfOneTensor with tensors in it"]


WITH_OTHERS = {
    "parameters": lambda: {"p": torch.nn.Parameter(filled(5)), "q": torch.nn.Parameter(filled(6), False)},
    "keys": lambda: {filled(3): filled(4)},
    "sets": lambda: {"set": {filled(3), filled(4)}},
    "sparse": lambda: {"eye": torch.eye(5).to_sparse(), "csr": torch.eye(4).to_sparse_csr()},
    "quantized": lambda: {"q": torch.quantize_per_tensor(torch.rand(6, 5), 0.1, 3, torch.qint8)},
    "attributes": lambda: {"with": with_attribute(filled(4), filled(5)), "conj": filled(3, dtype=torch.cfloat).conj()},
    "meta": lambda: {"meta": torch.empty(3, 4, device="meta")},
    "nothing else": dict,
}


def with_attribute(tensor, value):
    tensor.remark = value
    return tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("others", WITH_OTHERS)
@pytest.mark.parametrize("others_first", [False, True])
def test_tensors_that_are_made_late_among_others(others, others_first, backend, tmp_path):
    plain, more = deferred(), WITH_OTHERS[others]()
    torch.save({**more, **plain} if others_first else {**plain, **more}, tmp_path / "model.pt")
    expected = {name: tensor for name, tensor in flat(torch.load(tmp_path / "model.pt")) if "tensor(" not in name}
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        assert len(checkpoint) >= len(expected)
        for name, tensor in expected.items():
            assert difference(values_of(tensor), values_of(checkpoint[name]), name) is None
            info = checkpoint.info(name)
            assert (info.shape, info.dtype, info.nbytes) == (
                tensor.shape,
                tensor.dtype,
                tensor.numel() * tensor.itemsize,
            )
        if others == "quantized":  # all is read at once: nothing is made late
            return
        row = plain["base"][0].nbytes
        assert checkpoint.info("rows").offset == checkpoint.info("base").offset + 3 * row
        assert checkpoint.record("same") == checkpoint.record("base") != checkpoint.record("leaf")


@pytest.fixture
def made(monkeypatch):
    """The tensors that ``open_checkpoint`` makes late, by the keys of their storages."""
    keys = []
    init = unpickling.DeferredTensor.__init__

    def spy(self, call, make):
        init(self, call, lambda call: keys.append(call.key) or make(call))

    monkeypatch.setattr(unpickling.DeferredTensor, "__init__", spy)
    return keys


def test_only_what_is_asked_for_is_made(made, tmp_path):
    require_native()
    torch.save({f"w{i}": filled(3, seed=i) for i in range(100)}, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend="native") as checkpoint:
        assert len(checkpoint) == 100 and made == []
        assert torch.equal(checkpoint["w50"], filled(3, seed=50)) and checkpoint.info("w50").nbytes == 12
        assert checkpoint.get_slice("w7").shape == (3,)
        assert made == ["50", "7"]


EXCEPTIONS = [each for each in vars(builtins).values() if isinstance(each, type) and issubclass(each, BaseException)]


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


@pytest.mark.parametrize(
    ("allowed", "value", "deferred"),
    [
        ([Pair], 1, True),  # allowed, and not in the file
        ([Pair], Pair(1, 2), False),
        ([(zip, "builtins.zip"), (map, "builtins.map")], 1, True),
        (EXCEPTIONS, 1, True),
        ([ValueError], ValueError("x"), True),
        ([(lambda *_: None, "builtins.ValueError")], ValueError("x"), False),
    ],
    ids=["other", "class", "functions", "exceptions", "exception", "named like an exception"],
)  # fmt: skip
def test_what_is_allowed_and_not_in_the_file_makes_no_tensors(allowed, value, deferred, made, tmp_path):
    """From 2.14 on torch itself allows exceptions and more, in every process."""
    require_native()
    torch.save({**{f"w{i}": filled(3, seed=i) for i in range(100)}, "value": value}, tmp_path / "model.pt")
    path = tmp_path / "model.pt"
    with torch.serialization.safe_globals(allowed), sio.open_checkpoint(path, backend="native") as checkpoint:
        assert len(checkpoint) == 100 and made == []
        assert torch.equal(checkpoint["w50"], filled(3, seed=50))
        assert made == (["50"] if deferred else [])


def sparse_beside_plain(**more):
    return {
        "large": filled(1 << 16),
        "coo": torch.eye(5).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "bsc": torch.eye(4).to_sparse_bsc((2, 2)),
        **more,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validated", [False, True])
def test_sparse_tensors_are_validated_when_they_are_made(validated, backend, tmp_path):
    """torch validates those of a load: always from 2.14 on, before where it is told to. What has no data cannot be."""
    obj = sparse_beside_plain()
    torch.save(obj, tmp_path / "model.pt")
    with torch.sparse.check_sparse_tensor_invariants(validated):
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            assert checkpoint._tensors._file.bytes_read < obj["large"].nbytes
            for name, tensor in obj.items():
                assert difference(tensor, checkpoint[name]) is None
        torch.load(tmp_path / "model.pt")  # nothing of ours is left for it to validate


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [False, True])
def test_sparse_tensors_beside_one_that_needs_its_data(first, backend, tmp_path):
    """Opening fails in the middle and begins again: what has been made until then is nobody's to validate."""
    needy = {"q": torch.quantize_per_tensor(torch.arange(6.0), 0.1, 3, torch.qint8)}
    obj = {**needy, **sparse_beside_plain()} if first else {**sparse_beside_plain(), **needy}
    torch.save(obj, tmp_path / "model.pt")
    with torch.sparse.check_sparse_tensor_invariants():
        with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
            for name, tensor in obj.items():
                assert difference(tensor, checkpoint[name]) is None
        torch.load(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validated", [False, True])
def test_unsound_sparse_tensors_are_refused_as_torch_does(validated, backend, tmp_path):
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 9]]), torch.ones(2), (4,), check_invariants=False)
    csr = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 7]), torch.ones(2), (2, 2), check_invariants=False
    )
    for unsound in (coo, csr):
        torch.save(sparse_beside_plain(unsound=unsound), tmp_path / "model.pt")
        with torch.sparse.check_sparse_tensor_invariants(validated):
            error = None
            try:
                torch.load(tmp_path / "model.pt")
            except Exception as e:
                error = e
            with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
                assert difference(checkpoint["large"], filled(1 << 16)) is None
                if error is None:
                    assert checkpoint["unsound"].layout == unsound.layout
                else:
                    with pytest.raises(type(error)) as found:
                        checkpoint["unsound"]
                    assert str(found.value) == str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shared", ["values", "indices", "both"])
def test_sparse_tensors_whose_records_plain_ones_have_too(shared, backend, tmp_path):
    indices, values = torch.tensor([[0, 1, 2]]), filled(3)
    obj = {"large": filled(1 << 16), "s": torch.sparse_coo_tensor(indices, values, (4,))}
    obj |= {} if shared == "indices" else {"v": values}
    obj |= {} if shared == "values" else {"i": indices}
    torch.save(obj, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        for name, tensor in obj.items():
            assert difference(tensor, checkpoint[name]) is None
