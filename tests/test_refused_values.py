"""A value that torch's restricted unpickler refuses: the rest of the file can be read, nothing of it is executed."""

import collections
import io
import json
import pickle
import random
import struct
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader
from statedict_io.dcp.conversion import file_to_dcp
from statedict_io.pickles.set_aside import Refused, SetsAside

pytestmark = pytest.mark.filterwarnings("ignore")

calls = []


class Noisy(type):
    """Whatever is done to such a class or its instances is noted."""

    def __call__(cls, *args, **kwargs):
        calls.append("call")
        return super().__call__(*args, **kwargs)


def noisy(name, *bases):
    def note(what, result=None):
        def method(self, *args, **kwargs):
            calls.append(what)
            return result

        return method

    names = {what: note(what) for what in ("__setstate__", "append", "extend", "__setitem__")}
    names["__hash__"] = note("__hash__", 1)
    names["__new__"] = lambda cls, *args: calls.append("__new__") or (bases[0] if bases else object).__new__(cls)
    return Noisy(name, bases, {**names, "__module__": "refused_canary"})


Plain = noisy("Plain")
AList = noisy("AList", list)
ADict = noisy("ADict", dict)
AnOrderedDict = noisy("AnOrderedDict", collections.OrderedDict)
ATensor = type("ATensor", (torch.Tensor,), {"__module__": "refused_canary"})


def function(*args):
    calls.append("function")
    return torch.zeros(3)


@pytest.fixture(autouse=True)
def canary(monkeypatch):
    module = types.ModuleType("refused_canary")
    for each in (Plain, AList, ADict, AnOrderedDict, ATensor, function):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "refused_canary", module)
    monkeypatch.setattr(function, "__module__", "refused_canary")
    calls.clear()
    yield
    assert calls == []


class By:
    """Pickled as whatever ``reduction`` says."""

    def __init__(self, *reduction):
        self._reduction = reduction

    def __reduce__(self):
        return self._reduction


class New(By):
    """The same through the opcode NEWOBJ."""

    __class__ = property(lambda self: self._reduction[0])  # pickle compares

    def __reduce_ex__(self, protocol):
        import copyreg

        cls, *rest = self._reduction
        return (copyreg.__newobj__, (cls,), *rest)


shared = torch.arange(6.0)
FORMS = {
    "function": By(function, (1, shared)),
    "function of one tensor": By(function, (shared,)),
    "function of one large tensor": By(function, (torch.zeros(100_000),)),
    "function with a large tensor as its state": By(function, (), torch.zeros(100_000)),
    "function with state": By(function, (), {"a": shared}),
    "function with items": By(function, (), None, iter([1, shared])),
    "function with one item": By(function, (), None, iter([1])),
    "function with keys": By(function, (), None, None, iter([("a", shared), (2, 3)])),
    "function with one key": By(function, (), None, None, iter([("a", shared)])),
    "the class itself": Plain,
    "the function itself": function,
    "an allowed function of it": By(
        torch._utils._rebuild_parameter, (By(function, ()), True, collections.OrderedDict())
    ),
    "an allowed function of the class": By(
        torch._tensor._rebuild_from_type_v2,
        (torch._utils._rebuild_tensor_v2, ATensor, (shared, 0), {}),
    ),
    "an allowed object with its state": By(collections.OrderedDict, (), By(function, ())),
    "inside a refused one": By(function, (By(function, (By(function, ()),)),)),
    "a blocked module": By(__import__("os").system, ("touch /tmp/refused_canary",)),
    "a built-in": By(eval, ("1/0",)),
    "a stock class": collections.deque([1, shared]),
}
# Classes whose pickling would make a noise: by hand.
for _cls in (Plain, AList, ADict, AnOrderedDict):
    FORMS[f"instance of {_cls.__name__}"] = New(_cls, {"a": shared}, iter([1, shared]), iter([("k", shared)]))


def saved(path, value):
    """Between two tensors, of which one is shared with it."""
    torch.save({"before": torch.arange(5.0), "it": value, "after": {"t": shared, "n": 7}}, path)
    calls.clear()
    return path


@pytest.mark.parametrize("form", FORMS)
def test_all_else_can_be_read(form, backend, tmp_path):
    path = saved(tmp_path / "model.pt", FORMS[form])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert list(checkpoint) == ["before", "after.t"] and checkpoint.others == ["after.n"]
        assert torch.equal(checkpoint["before"], torch.arange(5.0)) and torch.equal(checkpoint["after.t"], shared)
        ((name, needs),) = checkpoint.refused.items()
        assert name == "it" and len(needs) >= 1
        assert "it" not in checkpoint and checkpoint.get("it") is None
        for asked in ("it", "it.a"):
            with pytest.raises(KeyError, match=r"'it' needs .*weights_only=False"):
                checkpoint[asked]
    state = {"before": torch.zeros(5), "after": {"t": torch.zeros(6), "n": None}}
    dcp.load(state, storage_reader=SingleFileReader(path, backend=backend), no_dist=True)
    assert torch.equal(state["before"], torch.arange(5.0)) and state["after"]["n"] == 7
    assert torch.equal(state["after"]["t"], shared)
    with pytest.raises(CheckpointException) as raised:
        dcp.load({"it": None}, storage_reader=SingleFileReader(path, backend=backend), no_dist=True)
    (error, _), *_ = raised.value.failures.values()
    assert isinstance(error, pickle.UnpicklingError)
    for part in ("model.pt", "'it'", needs[0], "SingleFileReader(path, weights_only=False)"):
        assert part in str(error)
    with pytest.raises(pickle.UnpicklingError, match=r"'it'.*weights_only=False"):
        convert(str(path), str(tmp_path / "x.safetensors"))
    with pytest.raises(BaseException, match=r"'it' needs (.|\n)*weights_only=False"):
        file_to_dcp(path, tmp_path / "dir", backend=backend)
    assert not (tmp_path / "x.safetensors").exists()


def test_names_tell_the_class(backend, tmp_path):
    numpy = pytest.importorskip("numpy")
    generator = numpy.random.RandomState(3)
    sio.save({"w": torch.ones(2), "rng": [1, (generator, 2)]}, tmp_path / "model.pt", backend=backend)
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        assert list(checkpoint.refused) == ["rng.1.0"] and "numpy.random" in str(checkpoint.refused)
    state = {"w": torch.zeros(2), "rng": None}
    with pytest.raises(CheckpointException, match=r"(?s)'rng' needs numpy\.random.*weights_only=False"):
        dcp.load(state, storage_reader=SingleFileReader(tmp_path / "model.pt", backend=backend), no_dist=True)
    reader = SingleFileReader(tmp_path / "model.pt", backend=backend, weights_only=False)
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state["rng"][1][0].randint(1000) == numpy.random.RandomState(3).randint(1000)


def test_where_all_of_it_is_refused(backend, tmp_path):
    torch.save(FORMS["function"], tmp_path / "model.pt")
    calls.clear()
    with pytest.raises(pickle.UnpicklingError, match="function"):
        sio.open_checkpoint(tmp_path / "model.pt", backend=backend)
    with pytest.raises(pickle.UnpicklingError, match=r"(?s)model\.pt.*function.*weights_only=False"):
        SingleFileReader(tmp_path / "model.pt", backend=backend).read_metadata()


def test_inspect_names_it(tmp_path, capsys):
    path = saved(tmp_path / "model.pt", FORMS["function"])
    assert main(["inspect", str(path)]) == 0
    assert "it (needs refused_canary.function)" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"] == {"it": ["refused_canary.function"]}


def test_what_the_user_allows_is_not_refused(backend, tmp_path):
    class Allowed:
        pass

    Allowed.__module__, Allowed.__qualname__ = "refused_canary", "Allowed"
    sys.modules["refused_canary"].Allowed = Allowed
    path = saved(tmp_path / "model.pt", [Allowed(), FORMS["function"]])
    with torch.serialization.safe_globals([Allowed]), sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert list(checkpoint.refused) == ["it.1"] and "it.0" in checkpoint.others
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert list(checkpoint.refused) == ["it.0", "it.1"]


# --- the unpickler alone


class Unpickler(SetsAside, torch._weights_only_unpickler.Unpickler):
    def persistent_load(self, saved_id):
        return saved_id


def program(rng):
    """Opcodes that mostly find on the stack what they want, refused and allowed globals among them."""
    out = [b"\x80\x02"]
    depth, marks, memo = 0, [], 0
    for _ in range(rng.randrange(3, 40)):
        choice = rng.randrange(18)
        if choice < 4:
            name = rng.choice(["Plain", "AList", "ADict", "function", "AnOrderedDict", "ATensor"])
            allowed = [b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch.nn.parameter\nParameter\n"]
            refused = [f"crefused_canary\n{name}\n".encode(), b"cos\nsystem\n", b"c__builtin__\neval\n"]
            out.append(rng.choice([*allowed, *refused * 2]))
            depth += 1
        elif choice < 8:
            out.append(rng.choice([b")", b"]", b"}", b"N", b"K\x05", b"X\x01\x00\x00\x00a", b"X\x03\x00\x00\x00cRb"]))
            depth += 1
        elif choice == 8:
            out.append(b"(")
            marks.append(depth)
            depth = 0
        elif choice == 9 and marks:
            out.append(b"t")
            depth = marks.pop() + 1
        elif choice == 10 and marks and marks[-1]:
            out.append(rng.choice([b"e", b"u"]))
            depth = marks.pop()
        elif choice == 11 and depth >= 2:
            out.append(rng.choice([b"R", b"\x81", b"b", b"a"]))
            depth -= 1
        elif choice == 12 and depth >= 1:
            out.append(rng.choice([b")R", b")\x81", b"}b"]))
        elif choice == 13 and depth >= 3:
            out.append(b"s")
            depth -= 2
        elif choice == 14 and depth:
            out.append(b"q" + struct.pack("B", memo))
            memo += 1
        elif choice == 15 and memo:
            out.append(b"h" + struct.pack("B", rng.randrange(memo)))
            depth += 1
        elif choice == 16 and depth:
            out.append(b"\x85")
        elif choice == 17 and depth >= 2:
            out.append(b"\x86")
            depth -= 1
    return b"".join([*out, b"t" * len(marks), b"."])


def unpickled(kind, stream):
    try:
        return kind(io.BytesIO(stream)).load()
    except Exception as e:
        return e


def holds_refused(value):
    if isinstance(value, dict):
        return any(holds_refused(item) for pair in value.items() for item in pair)
    return isinstance(value, Refused) or (isinstance(value, (list, tuple)) and any(map(holds_refused, value)))


@pytest.mark.parametrize("count", [4000, pytest.param(400_000, marks=pytest.mark.long)])
def test_no_program_calls_what_is_refused(count):
    """Random programs: nothing refused is called, and what torch's unpickler accepts is the same here."""
    rng = random.Random(6)
    accepted = set_aside = 0
    for _ in range(count):
        stream = program(rng)
        found = unpickled(Unpickler, stream)
        expected = unpickled(torch._weights_only_unpickler.Unpickler, stream)
        assert calls == [], stream
        if not isinstance(expected, Exception):
            accepted += 1
            assert type(found) is type(expected) and repr(found) == repr(expected), stream
        elif not isinstance(found, Exception):
            set_aside += holds_refused(found)
    assert accepted > count / 100 and set_aside > count / 100, (accepted, set_aside)
