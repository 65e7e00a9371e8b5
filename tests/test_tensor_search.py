"""Tensors are found in objects that flat names do not enter, in bounded time and without recursion."""

import collections
import functools
import re
import types

import pytest
import torch

from statedict_io import StateDictIOError
from statedict_io.names.tensor_search import TensorSearch
from statedict_io.untrusted.limits import max_searched_parts

T = torch.ones(2)


class WithAttributes:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class WithSlots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class OwnList(list):
    pass


class OwnDict(dict):
    pass


class Unpicklable:
    def __reduce__(self):
        raise TypeError("no")


def nested(levels, value):
    for _ in range(levels):
        value = (value,)
    return value


def in_itself(*values):
    found = [*values]
    found.append(found)
    return WithAttributes(found=found)


OBJECTS = {
    "a set": lambda value: {value},
    "a frozenset in a set": lambda value: {frozenset({1, value})},
    "attributes": lambda value: WithAttributes(a=1, b={"c": [value]}),
    "attributes of attributes": lambda value: WithAttributes(a=WithAttributes(b=value)),
    "slots": lambda value: WithSlots(value),
    "a list's class": lambda value: WithAttributes(a=OwnList([1, value])),
    "a dictionary's class": lambda value: WithAttributes(a=OwnDict(a=1, b=value)),
    "a deque": lambda value: collections.deque([1, value]),
    "a partial call": lambda value: functools.partial(print, 1, b=value),
    "a namespace": lambda value: types.SimpleNamespace(a=value),
    "a key": lambda value: WithAttributes(a={(value, 1): 2}),
    "a container in itself": lambda value: in_itself(1, value),
    "tuples of 900 levels in a set": lambda value: {nested(900, value)},
    "tuples of 50,000 levels": lambda value: WithAttributes(a=nested(50_000, value)),
    "beside what cannot be pickled": lambda value: WithAttributes(a=Unpicklable(), b=value),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_tensor_in(name):
    for value, is_there in ((T, True), (1, False), ("text", False), (T.untyped_storage(), False), (dict, False)):
        if name in ("a key", "a frozenset in a set") and isinstance(value, torch.UntypedStorage):
            continue
        assert TensorSearch((torch.Tensor,), 1000).is_in(OBJECTS[name](value)) == is_there


def test_parts_that_are_shared_are_searched_once():
    shared = 1
    for _ in range(200):
        shared = [shared, shared]
    assert not TensorSearch((torch.Tensor,), 1000).is_in(WithAttributes(a=shared))
    search = TensorSearch((torch.Tensor,), 1000)
    with_many = {*range(100_000)}
    assert not any(search.is_in(with_many) for _ in range(1000))


def test_there_is_a_limit_for_all_objects_together():
    search = TensorSearch((torch.Tensor,), 1000)
    shared = tuple(range(10_000))
    objects = [{shared, i} for i in range(1000)]
    with pytest.raises(StateDictIOError, match=re.escape(f"more than {max_searched_parts(1000)} parts")):
        for each in objects:
            search.is_in(each)
