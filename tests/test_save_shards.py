"""Sets of shards against ``huggingface_hub.save_torch_state_dict`` as it is installed, and what is there while one set
takes the place of another."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import require_package
from oracle import attempt
from shard_sets import contents_of as contents
from shard_sets import state_of, whole_set

import statedict_io as sio
from statedict_io.system.directories import OpenDirectory
from statedict_io.writing import shard_sets

require_package("huggingface_hub")
from huggingface_hub import save_torch_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def tied_state():
    embedding = torch.arange(3000.0)
    return {"head": embedding, "body.0": torch.ones(700), "emb": embedding, "body.1": torch.ones(5, 5).t()}


# (state dict, bytes a shard)
STATES = {
    "five shards": ({f"layer.{i}": torch.full((1000,), float(i)) for i in range(10)}, 8000),
    "one larger than a shard": ({"a": torch.ones(10), "b": torch.ones(5000), "c": torch.ones(10)}, 1000),
    "one shard": ({"a": torch.ones(10), "b": torch.ones(10)}, 10**9),
    "tied": (tied_state(), 4000),
    "empty ones": ({"d": torch.empty(0), "b": torch.ones(600), "c": torch.ones(600), "e": torch.empty(0, 3)}, 3000),
    "names": ({'a"é\n': torch.ones(100), "": torch.ones(100), "\U0001f600": torch.ones(100)}, 400),
    "a module": (torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(6))).state_dict(), 2500),
}


@pytest.mark.parametrize(("state", "nbytes"), STATES.values(), ids=STATES)
def test_same_files(state, nbytes, tmp_path, backend):
    for name in ("ref", "ours"):
        (tmp_path / name).mkdir()
    save_torch_state_dict(dict(state), tmp_path / "ref", max_shard_size=nbytes)
    before = dict(state)
    assert sio.save_safetensors(state, tmp_path / "ours", max_shard_nbytes=nbytes, backend=backend) is None
    assert list(state) == list(before)  # theirs takes tensors out of it
    assert contents(tmp_path / "ours") == contents(tmp_path / "ref")
    assert {re.sub(r"\d", "0", name) for name in contents(tmp_path / "ours")} <= {
        "model.safetensors",
        "model-00000-of-00000.safetensors",
        "model.safetensors.index.json",
    }


def test_parts_of_one_storage(tmp_path, backend):
    """That do not overlap: theirs refuses them, where its ``save_file`` does not."""
    whole = torch.arange(1000)
    state = {"a": whole[:10], "b": torch.ones(600), "c": whole[10:]}
    sio.save_safetensors(state, tmp_path, max_shard_nbytes=3000, backend=backend)
    found = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_metadata_is_in_the_index(tmp_path, backend):
    state = STATES["five shards"][0]
    for name in ("ref", "ours"):
        (tmp_path / name).mkdir()
    save_torch_state_dict(state, tmp_path / "ref", max_shard_size=8000, metadata={"b": "1", "a": "2"})
    sio.save_safetensors(state, tmp_path / "ours", {"b": "1", "a": "2"}, max_shard_nbytes=8000, backend=backend)
    assert contents(tmp_path / "ours") == contents(tmp_path / "ref")


def test_the_name_is_that_of_the_path(tmp_path, backend):
    state = STATES["five shards"][0]
    (tmp_path / "ref").mkdir()
    save_torch_state_dict(
        state, tmp_path / "ref", max_shard_size=8000, filename_pattern="llama[7b]{suffix}.safetensors"
    )
    (tmp_path / "ours").mkdir()
    for path in ("llama[7b].safetensors", "llama[7b].safetensors.index.json"):
        sio.save_safetensors(state, tmp_path / "ours" / path, max_shard_nbytes=8000, backend=backend)
        assert contents(tmp_path / "ours") == contents(tmp_path / "ref")


def test_transformers_loads_it(tmp_path):
    require_package("transformers")
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = BertModel(config)
    config.save_pretrained(tmp_path)
    sio.save_safetensors(model.state_dict(), tmp_path, max_shard_nbytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    loaded = BertModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


X = torch.arange(6.0)
REFUSED = {
    "no whole one": ({"a": X[:4], "b": X[2:]}, "a, b"),
    "a list": ([X], "list"),
    "no tensor": ({"lr": 0.1}, "'lr'"),
    "sparse": ({"s": torch.eye(2).to_sparse()}, "s"),
    "complex128": ({"wide": torch.ones(1, dtype=torch.complex128)}, "'wide'"),
}


@pytest.mark.parametrize(("state", "named"), REFUSED.values(), ids=REFUSED)
def test_refusals(state, named, tmp_path, backend):
    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000, backend=backend)
    before = contents(tmp_path)
    _, reference = attempt(save_torch_state_dict, state, tmp_path / "none")
    _, error = attempt(sio.save_safetensors, state, tmp_path, max_shard_nbytes=4000, backend=backend)
    assert isinstance(error, sio.StateDictIOError) and named in str(error)
    if not isinstance(reference, AttributeError) and "memory format" not in str(reference):  # theirs falls over it
        assert isinstance(error, type(reference))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "options", "kind", "says"),
    [
        ("model.pt", {}, ValueError, "ends in .safetensors"),
        ("missing", {}, ValueError, "existing directory"),
        ("memory://x/model.safetensors", {}, ValueError, "local directory"),
        (7, {}, TypeError, "local directory"),
        ("model.safetensors", {"max_shard_nbytes": 0}, ValueError, "at least 1"),
        ("model.safetensors", {"max_shard_nbytes": "5GB"}, TypeError, "number of bytes"),
        ("model.safetensors", {"atomic": False}, ValueError, "atomic"),
    ],
)
def test_wrong_arguments(path, options, kind, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says):
        sio.save_safetensors({"x": X}, path, **{"max_shard_nbytes": 10, **options})
    assert os.listdir(tmp_path) == []


# ---- one set takes the place of another

#: bytes a shard, of a state of 12 kB
SIZES = {"one file": 10**6, "two": 8000, "three": 4000}


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_only_the_new_set_is_left(old, new, tmp_path, backend):
    others = {
        name: b"mine" for name in ("config.json", "model.safetensors.bak", "model-x.safetensors", "a.safetensors")
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=SIZES[old], backend=backend)
    sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=SIZES[new], backend=backend)
    found = contents(tmp_path)
    assert {name: found.pop(name) for name in others} == others
    (tmp_path / "alone").mkdir()
    sio.save_safetensors(state_of(2), tmp_path / "alone", max_shard_nbytes=SIZES[new], backend=backend)
    assert found == contents(tmp_path / "alone")
    assert whole_set(tmp_path) == 2


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_system_without_hard_links(durable, tmp_path, backend, monkeypatch):
    """Between two sets of the same names there is no index there: nobody takes a mixture for a set."""
    seen = []

    def refuse(self, name, new_name):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), name)

    def move(self, name, new_name, move=OpenDirectory.move):
        move(self, name, new_name)
        if (tmp_path / "model.safetensors.index.json").exists():
            seen.append(whole_set(tmp_path))

    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000, backend=backend)
    monkeypatch.setattr(OpenDirectory, "link", refuse)
    monkeypatch.setattr(OpenDirectory, "move", move)
    sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=4000, backend=backend, durable=durable)
    assert seen == sorted(seen) and {*seen} == {1, 2}
    assert whole_set(tmp_path) == 2 and len(os.listdir(tmp_path)) == 4


def test_a_set_whose_saver_was_killed_is_removed(tmp_path, backend):
    token = "0123456789ab"
    for name in (f"model-00001-of-00009.{token}.safetensors", "model-00009-of-00009.safetensors"):
        (tmp_path / name).write_bytes(b"of a set that never was")
    temporary = tmp_path / f".model-00001-of-00009.safetensors.{token}.sdio-tmp"
    temporary.write_bytes(b"")
    os.utime(temporary, (1e9, 1e9))
    sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=8000, backend=backend)
    assert sorted(os.listdir(tmp_path)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_savers_at_once(tmp_path):
    """One of the sets is there in the end, whole. Locks are those of open files: threads are kept apart as processes
    are."""

    def save_often(first):
        for generation in range(first, 150, 2):
            sio.save_safetensors(state_of(generation), tmp_path, max_shard_nbytes=4000, durable=False)

    with ThreadPoolExecutor(2) as savers:
        for done in [savers.submit(save_often, first) for first in (100, 101)]:
            done.result()
    assert whole_set(tmp_path) in (148, 149)
    assert len(os.listdir(tmp_path)) == 4


def test_a_later_call_wins(tmp_path):
    """From a callback of the first, which leaves alone what the later one has committed."""
    done = []

    def save_another(*_):
        if not done:
            done.append(True)
            sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=4000)

    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000, progress=save_another)
    assert done and whole_set(tmp_path) == 2 and len(os.listdir(tmp_path)) == 4


def test_a_signal_handler_in_the_middle(tmp_path, monkeypatch):
    """While files are put in place another save of the set cannot wait, and must not mix its files in."""
    refused, move = [], OpenDirectory.move

    def move_and_be_interrupted(self, name, new_name):
        move(self, name, new_name)
        if not refused:
            refused.append(attempt(sio.save_safetensors, state_of(3), tmp_path, max_shard_nbytes=4000)[1])

    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000)
    monkeypatch.setattr(OpenDirectory, "move", move_and_be_interrupted)
    sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=4000)
    assert refused[0].errno == errno.EBUSY and "index.json" in refused[0].filename
    assert whole_set(tmp_path) == 2 and len(os.listdir(tmp_path)) == 4


def test_progress_counts_all_files(tmp_path, backend):
    told = []
    sio.save_safetensors(
        state_of(1), tmp_path, max_shard_nbytes=4000, backend=backend, progress=lambda *numbers: told.append(numbers)
    )
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert told == sorted(told) and told[-1] == (total, total)


def test_errors_carry_the_path_of_the_file(tmp_path, backend, monkeypatch):
    def fail(content, file, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sio.save_safetensors(state_of(1), tmp_path, max_shard_nbytes=4000, backend=backend)
    monkeypatch.setattr(shard_sets, "write_content", fail)
    with pytest.raises(OSError) as caught:
        sio.save_safetensors(state_of(2), tmp_path, max_shard_nbytes=4000, backend=backend)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "model-00001-of-00003.safetensors")
    assert whole_set(tmp_path) == 1 and len(os.listdir(tmp_path)) == 4
