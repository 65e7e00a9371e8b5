"""States have the flat names that DCP gives them."""

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from statedict_io import StateDictIOError
from statedict_io.dcp.flattening import flatten

T = torch.ones(2)
STATES = {
    "flat": {"a": T, "b": 1, "c": [1, 2], "d": (T, 1)},
    "mappings": {"a": {"b": {"c": T, "d": {}}}, "e": {1: T, 2.5: {None: 3, True: T}}, ("x", 1): {"y": T}},
    "lists": {
        "a": [T, 1, [2, 3], [T, [4]]],
        "b": [[1], [[2]], []],
        "c": [[[T]], 1],
        "d": [{"x": 1}],
        "e": [({"x": T},)],
    },
    "a list of empty mappings": {"a": [{}], "b": [[{}], 1]},
    "shared lists": (lambda shared: {"a": shared, "b": [shared, shared], "c": {"d": [1, shared]}})([T, [1, [2]], [[]]]),
    "nothing": {},
    "keys with dots": {"a.b": 1, "a": {"c": T}},
}


def is_empty_mapping(value):
    return isinstance(value, dict) and not value


@pytest.mark.parametrize("name", STATES)
def test_names_and_paths_are_those_of_dcp_and_those_of_empty_mappings(name):
    values, paths, renamed = flatten(STATES[name], 10_000)
    expected_values, expected_paths = flatten_state_dict(STATES[name])
    kept = [key for key in values if not is_empty_mapping(values[key])]
    assert kept == [*expected_values] and all(values[key] is expected_values[key] for key in kept)
    assert [(key, paths[key]) for key in kept] == [*expected_paths.items()] and [*paths] == [*values]
    assert all(type(part) in (str, int) for path in paths.values() for part in path)
    assert set(renamed) <= set(values)


def test_empty_mappings_have_names():
    values, _, _ = flatten({"a": [{}], "b": {"c": {}, "d": 1}, "e": {}}, 1000)
    assert values == {"a.0": {}, "b.c": {}, "b.d": 1, "e": {}}


def test_keys_that_have_become_strings():
    _, paths, renamed = flatten({"a": {"1": T, 1.5: T, True: {"b": T}}, "c": [T]}, 1000)
    assert renamed == ["a.1.5", "a.True.b"]
    assert paths == {"a.1": ("a", "1"), "a.1.5": ("a", "1.5"), "a.True.b": ("a", "True", "b"), "c.0": ("c", 0)}


def test_two_values_of_one_name():
    for state, first, second in (
        ({"a": {"b": 1}, "a.b": 2}, "['a']['b']", "['a.b']"),
        ({"0": 1, 0: 2}, "['0']", "[0]"),
    ):
        with pytest.raises(StateDictIOError) as caught:
            flatten(state, 1000)
        assert f"{first} and {second} would both be called" in str(caught.value)


def test_a_container_in_itself():
    inside = [1]
    inside.append([inside, T])
    mapping = {"a": 1}
    mapping["b"] = [mapping]
    for state in ({"a": inside}, {"m": mapping}, mapping):
        with pytest.raises(StateDictIOError, match="a container is in itself"):
            flatten(state, 1000)
