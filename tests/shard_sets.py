"""States that tell which generation they are of, and how readers find them in a directory."""

import json

import torch
from safetensors.torch import load_file


def contents_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def state_of(generation, size=1000):
    return {name: torch.full((size,), float(generation)) for name in ("a", "b", "c")}


def whole_set(directory):
    """The generation of the set in a directory, all of which is looked at, as readers find it that begin with the
    index; those that begin with the single file must find a whole one too."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    found = [generation_of(directory, index)] if index.exists() else []
    if single.exists() or not found:
        found.append(generation_of_tensors(load_file(single)))
    return found[0]


def generation_of(directory, index):
    files = json.loads(index.read_bytes())["weight_map"]
    shards = {file: load_file(directory / file) for file in sorted(set(files.values()))}
    return generation_of_tensors({name: shards[file][name] for name, file in files.items()})


def generation_of_tensors(tensors):
    assert sorted(tensors) == ["a", "b", "c"]
    generations = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    assert len(generations) == 1, f"a mixture of {generations}"
    return int(generations.pop())
