"""What lies around the tensors: containers, keys, sharing between Python objects, objects with their own pickling."""

import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import types
import uuid

import numpy as np
import torch
from corpus_case import Corpus, filled, numbers, random_bytes

PYTHON = Corpus()


@PYTHON.each(
    [
        {},
        [],
        (),
        0,
        1,
        -1,
        255,
        256,
        65535,
        65536,
        2**31,
        -(2**31) - 1,
        2**63,
        -(2**70),
        2**3000,
        None,
        True,
        1.5,
        float("-inf"),
        1j,
        "",
        "text",
        "ü€😀",
        "a\nb\\",
        b"",
        b"\x00\xff",
        ...,
        int,
        torch.float32,
        torch.bfloat16,
        torch.Size([2, 3]),
        torch.Size([]),
        torch.device("cpu"),
        torch.device("cuda", 1),
        torch.strided,
        torch.sparse_coo,
        torch.contiguous_format,
        torch.per_tensor_affine,
    ],
    label=lambda value: ascii(value)[:40],
)
def top_level(value):
    return value


@PYTHON.case
def scalars_of_every_size():
    ints = [
        sign * (2**power + step)
        for power in (7, 8, 15, 16, 31, 32, 63, 64, 2039, 2040)
        for step in (-1, 0, 1)
        for sign in (1, -1)
    ]
    return {"ints": ints, "floats": [0.0, -0.0, 1e308, float("inf")], "none": None, "bools": [True, False]}


@PYTHON.case
def long_strings_and_bytes():
    return {
        "ascii": ["x" * n for n in (1, 255, 256, 257, 70_000)],
        "wide": ["é" * 127, "é" * 128, "😀" * 70, "\ud800 lone surrogate"],
        "bytes": [bytes(range(256)) * n for n in (0, 1, 300)],
        "bytearray": bytearray(b"changeable"),
        "k" * 300: filled(2),
    }


@PYTHON.case
def keys_that_are_not_strings():
    tensor = filled(3)
    return {
        0: tensor,
        -5: tensor,
        (1, "a"): filled(2),
        None: 1,
        b"bytes": 2,
        1.5: 3,
        True: 4,
        "ключ": filled(1),
        torch.float16: 5,
    }


@PYTHON.case
def containers():
    shared = [1, 2]
    return {
        "list": [shared, shared],
        "tuple": (1, (2, (3, ()))),
        "tuples by length": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "set": {5},
        "frozenset": frozenset([6]),
        "defaultdict": collections.defaultdict(list, a=[filled(2)]),
        "ordered": collections.OrderedDict(b=filled(1), a=1),
        "counter": collections.Counter("hello"),
        "deque": collections.deque([1, filled(2)], maxlen=3),
        "namespace": types.SimpleNamespace(x=filled(3)),
        "range": range(3, 9, 2),
        "slice": slice(1, None),
    }


@PYTHON.each([999, 1000, 1001, 2001])
def batches(length):
    """Picklers write items in batches of 1,000."""
    return {"dict": {i: i for i in range(length)}, "list": list(range(length)), "set": set(range(length))}


@PYTHON.case
def shared_objects_and_cycles():
    shared = {"name": "shared", "tensor": filled(4)}
    looped = [shared, shared]
    looped.append(looped)
    shared["up"] = looped
    pair = (shared, [])
    pair[1].append(pair)
    return {"loop": looped, "pair": pair, "again": shared}


@PYTHON.case
def equal_but_distinct_objects():
    text = "".join(["eq", "ual"])
    return [
        text,
        "".join(["eq", "ual"]),
        text,
        b"x" * 20,
        bytes(bytearray(b"x" * 20)),
        (1, text),
        (1, text),
        filled(2),
        filled(2),
    ]


@PYTHON.case
def keys_shared_by_nested_dicts():
    rows = [{"weight": filled(2, seed=i), "bias": None} for i in range(5)]
    return {"weight": rows, "bias": {"weight": 1}}


@PYTHON.case
def more_than_256_memo_entries():
    names = [f"name {i}" for i in range(600)]
    return {"first": names, "second": list(reversed(names)), "tensors": [filled(1, seed=i) for i in range(300)]}


@PYTHON.case
def deeply_nested():
    value = filled(3)
    for i in range(120):
        value = {"in": value} if i % 3 else [value, (i,)]
    return value


@PYTHON.case
def nested_past_the_recursion_limit():
    value = filled(3)
    for _ in range(100_000):
        value = [value]
    return value


@PYTHON.case
def metadata_on_an_ordered_dict():
    state = collections.OrderedDict(weight=filled(2, 3), bias=filled(3))
    state._metadata = collections.OrderedDict([("", {"version": 1}), ("layer", {"version": 2})])
    state.note = "an attribute"
    return state


@PYTHON.case
def numpy_objects():
    array = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    return {
        "array": array,
        "view": array[1:, ::2],
        "fortran": np.asfortranarray(array),
        "zero size": array[:0],
        "record": np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        "object": np.array([1, "two"], dtype=object),
        "scalar": np.float64(2.5),
        "dtype": np.dtype("int8"),
        "big endian": np.arange(3, dtype=">i4"),
        "tensor": filled(2),
    }


@PYTHON.case
def top_level_numpy_array():
    return np.arange(1, 50, dtype=np.int16)


@PYTHON.case
def generator_states():
    generator = torch.Generator().manual_seed(42)
    return {
        "state": generator.get_state(),
        "numpy": np.random.RandomState(5).get_state(),
        "generator": np.random.default_rng(7),
    }


@PYTHON.case
def top_level_generator():
    return torch.Generator().manual_seed(42)  # whatever torch.save does with it: it differs between versions


class Colour(enum.Enum):
    RED = 1
    BLUE = "blue"


Point = collections.namedtuple("Point", "x y")


@PYTHON.case
def library_objects():
    return {
        "enum": [Colour.RED, Colour.BLUE, Colour.RED],
        "point": Point(1, filled(2)),
        "path": pathlib.PurePosixPath("a/b"),
        "date": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc),
        "decimal": decimal.Decimal("1.10"),
        "fraction": fractions.Fraction(1, 3),
        "uuid": uuid.UUID(int=5),
        "partial": functools.partial(int, base=2),
        "function": torch.nn.functional.relu,
        "builtin": len,
        "class": collections.OrderedDict,
    }


class SlotsAndState:
    __slots__ = ("__dict__", "a", "b")

    def __init__(self):
        self.a, self.b, self.extra = filled(2), [1], "in the dict"


@PYTHON.case
def object_with_slots():
    return SlotsAndState()  # protocol 2 and later only


def rebuild(tensor, scale):
    return tensor * scale


class MakesATensorInReduce:
    """Its storage lives only while it is pickled: a freed address that comes back must not be taken for the old one."""

    def __init__(self, seed):
        self.seed = seed

    def __reduce__(self):
        return rebuild, (numbers(1000, seed=self.seed), 2)


class MakesATensorInGetstate:
    def __init__(self, seed):
        self.seed = seed

    def __getstate__(self):
        return {"made": numbers(1000, seed=self.seed), "storage": random_bytes(4000, seed=self.seed).untyped_storage()}


@PYTHON.case
def storages_made_while_pickling():
    return {
        "reduce": [MakesATensorInReduce(i) for i in range(20)],
        "getstate": [MakesATensorInGetstate(i) for i in range(20)],
        "kept": filled(1000),
    }


class FillsInGetstate:
    """Changes a tensor that was pickled before: payloads are read after pickling."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getstate__(self):
        self.tensor.fill_(7.25)
        return {}


@PYTHON.case
def tensor_changed_while_pickling():
    tensor = filled(100)
    return [tensor, FillsInGetstate(tensor)]


class LooksLikeAStorage:
    """Not a storage, though it has a storage's attributes."""

    def __init__(self):
        self.dtype, self._untyped_storage, self.device = torch.float32, None, "cpu"


@PYTHON.case
def object_with_a_storages_attributes():
    return {"it": LooksLikeAStorage(), "tensor": filled(3)}


@PYTHON.case
def persistent_id_like_tuples():
    return [("storage", torch.FloatStorage, "0", "cpu", 3), filled(3), "cpu", "storage", "0"]


class IntSubclass(int):
    pass


class DictSubclass(dict):
    pass


@PYTHON.case
def subclasses_of_builtins():
    strict = DictSubclass(a=filled(2))
    strict.attribute = filled(3)
    return [IntSubclass(7), strict, collections.UserDict(a=1), type("Local", (), {}).__mro__[1]]
