"""Pickles without unused memo entries build the same objects; on the native backend."""

import io
import pickle
import pickletools
import random
import zipfile

import pytest
import torch
from conftest import require_native
from corpus import CORPUS
from equality import difference


@pytest.fixture
def lean():
    require_native()
    from statedict_io import _core

    return _core.testing.without_unused_puts


def data_pkl(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def ops(data):
    return [opcode.name for opcode, _, _ in pickletools.genops(data)]


def test_the_stream_of_a_state_dict_shrinks_to_what_pickletools_makes_of_it(lean):
    data = data_pkl({f"layers.{i}": torch.ones(3) for i in range(500)})
    assert len(lean(data)) < 0.75 * len(data)
    puts = [name for name in ops(lean(data)) if name.endswith("PUT")]
    assert len(puts) == len([name for name in ops(pickletools.optimize(data)) if name.endswith("PUT")]) < 10


def abridged(data):
    require_native()
    from statedict_io import _core

    return _core.abridged_pickle(data)


def test_all_plain_tensors_but_the_first_of_a_kind_are_taken_out():
    obj = {f"layers.{i}": torch.ones(3, i) for i in range(300)} | {"p": [torch.nn.Parameter(torch.ones(2))] * 3}
    stream, calls = abridged(data_pkl(obj))
    assert len(calls) == 300
    assert calls[0] == ("torch FloatStorage", "1", "cpu", 3, 0, (3, 1), (1, 1), False)
    assert ops(stream).count("BINPERSID") == 301


def test_a_call_is_taken_out_to_the_letter_only():
    """Of another function, with hooks, metadata or negative numbers it is torch's."""
    plain = data_pkl([torch.ones(3), torch.ones(3)])
    assert len(abridged(plain)[1]) == 1
    for replaced in (
        plain.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"),
        plain.replace(b"OrderedDict", b"OrderedDicT"),
        plain.replace(b"torch._utils", b"evil._utils_"),
        plain.replace(b"storage", b"STORAGE"),
        plain.replace(b"K\x03\x85", b"N\x85"),
    ):
        assert replaced != plain and abridged(replaced)[1] == []
    assert (
        abridged(data_pkl([torch.ones(3, dtype=torch.cfloat).conj()] * 2 + [torch.ones(3, dtype=torch.cfloat).conj()]))[
            1
        ]
        == []
    )


@pytest.mark.parametrize(
    "reference",
    [
        b"K\x00Q",
        b"J\x00\x00\x00\x00Q",
        b"X\x07\x00\x00\x00storageK\x00\x86Q",
        b"(X\x07\x00\x00\x00storageK\x00tQ",
    ],
)
def test_forged_references_are_refused(reference, backend, tmp_path):
    """What stands for a call in an abridged stream means nothing in a file."""
    import statedict_io as sio

    plain = data_pkl([torch.ones(3), torch.ones(3)])
    forged = plain.replace(b"\x80\x02", b"\x80\x02" + reference, 1)
    file = io.BytesIO()
    torch.save([torch.ones(3), torch.ones(3)], file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "model.pt", "w") as new:
        for record in old.namelist():
            new.writestr(record, forged if record.endswith("/data.pkl") else old.read(record))
    with pytest.raises(Exception) as expected:
        torch.load(tmp_path / "model.pt")
    with pytest.raises(type(expected.value)) as found:
        sio.load(tmp_path / "model.pt", backend=backend)
    assert str(found.value) == str(expected.value)


def random_object(generator, pool, depth=0):
    kind = generator.randrange(9 if depth < 5 else 4)
    if kind == 0:
        return generator.choice([None, True, False, 0, 255, 65536, -1, 2**31, 2**70, 1.5, float("inf")])
    if kind == 1:
        return "x" * generator.choice([0, 1, 255, 300])
    if kind == 2:
        return b"q\x00" * generator.choice([0, 1, 200])
    if kind == 3 and pool:
        return generator.choice(pool)
    items = [random_object(generator, pool, depth + 1) for _ in range(generator.randrange(5))]
    if kind == 4:
        made = {str(i): item for i, item in enumerate(items)}
    elif kind == 5:
        made = tuple(items)
    else:
        made = items
    pool.append(made)
    return made


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_random_objects(protocol, lean):
    for seed in range(300):
        obj = random_object(random.Random(seed), [])
        data = pickle.dumps(obj, protocol)
        found = pickle.loads(lean(data))
        # Pickled again, shared parts show.
        assert pickle.dumps(found, protocol) == pickle.dumps(pickle.loads(data), protocol), f"seed {seed}"
        assert len(lean(data)) <= len(data)


def test_damaged_streams_are_no_worse_than_before(lean):
    data = data_pkl({"a": torch.ones(3), "b": [torch.ones(2)] * 3})
    for seed in range(2000):
        generator = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        lean(bytes(damaged))
        lean(bytes(damaged[: generator.randrange(len(damaged))]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["tied_and_overlapping", "module_state_dict", "keys_shared_by_nested_dicts", "containers"]
)
def test_shared_objects_stay_shared(name, lean):
    file = io.BytesIO()
    torch.save(CORPUS[name](), file)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(rewritten, "w") as new:
        for record in old.namelist():
            content = old.read(record)
            new.writestr(record, lean(content) if record.endswith("/data.pkl") else content)
    file.seek(0), rewritten.seek(0)
    expected, found = torch.load(file, weights_only=False), torch.load(rewritten, weights_only=False)
    assert difference(expected, found) is None
    again, ours = io.BytesIO(), io.BytesIO()
    torch.save(expected, again), torch.save(found, ours)
    assert again.getvalue() == ours.getvalue()
