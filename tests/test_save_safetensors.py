"""save_safetensors against ``safetensors.torch.save_file`` as it is installed, byte by byte and error by error."""

import io
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import require_package
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import attempt

import statedict_io as sio

require_package("safetensors")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ANY_DTYPE = [found for found in vars(torch).values() if isinstance(found, torch.dtype)]
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # torch's about the odd kinds of tensors


def dtypes(tmp_path):
    """Those that the installed package writes."""
    for dtype in dict.fromkeys(ANY_DTYPE):
        made, error = attempt(torch.empty, 4, dtype=dtype)
        if error is None and attempt(save_file, {"x": made}, tmp_path / "probe")[1] is None:
            yield dtype


def filled(shape, dtype):
    """Any bytes, as a tensor."""
    count = torch.empty(shape, device="meta").numel() * dtype.itemsize
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def assert_same_file(state, tmp_path, backend, metadata=None, **options):
    save_file(state, tmp_path / "ref.safetensors", metadata=metadata)
    ours = tmp_path / "ours.safetensors"
    assert sio.save_safetensors(state, ours, metadata, backend=backend, **options) is None
    expected, found = (tmp_path / "ref.safetensors").read_bytes(), ours.read_bytes()
    length = 8 + int.from_bytes(expected[:8], "little")
    assert found[:length] == expected[:length]
    assert found == expected


def shared_storage():
    whole = torch.arange(1000)
    return {"first": whole[:300], "second": whole[300:301], "third": whole[301:]}


STATES = {
    "nothing": {},
    "one": {"weight": torch.arange(10.0)},
    "a module": torch.nn.Sequential(torch.nn.Linear(30, 7), torch.nn.BatchNorm1d(7)).state_dict(),
    "parameters": dict(torch.nn.Linear(3, 3).named_parameters()),
    "an ordered dict": OrderedDict(b=torch.ones(2), a=torch.ones(3, dtype=torch.int8)),
    "scalars and empty ones": {
        "s": torch.tensor(3),
        "e": torch.empty(0, 5),
        "f": torch.tensor(True),
        "g": torch.ones(1),
    },
    "names": {
        name: torch.ones(2) for name in ('"', "\\", "\n\t\x01\x7f", "é", "\U0001f600", "", "a/b", "￿", "\U00010000")
    },
    "parts of one storage": shared_storage(),
    "many": {f"layer.{i}.weight": torch.full((i % 7, 3), i, dtype=torch.int16) for i in range(3000)},
    # Several regions of 8 MiB, in which offsets have no alignment.
    "large": {
        "a": torch.arange(5_000_001, dtype=torch.int32),
        "b": torch.ones(1, dtype=torch.bool),
        "c": filled((9 << 20,), torch.uint8),
    },
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_same_bytes(state, tmp_path, backend):
    assert_same_file(state, tmp_path, backend)


def test_same_bytes_of_every_dtype(tmp_path, backend):
    found = [*dtypes(tmp_path)]
    assert {torch.bool, torch.bfloat16, torch.complex64, torch.uint64, torch.float8_e4m3fn} <= {*found}
    for dtype in found:
        assert_same_file({"x": filled((6, 4), dtype)}, tmp_path, backend)
    mixed = {f"{dtype}.{name}": filled((2, i), dtype) for i, dtype in enumerate(found) for name in "ba"}
    assert_same_file(mixed, tmp_path, backend)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"kë\ny": 'v"'}])
def test_metadata(metadata, tmp_path, backend):
    assert_same_file({"x": torch.ones(3)}, tmp_path, backend, metadata)


def test_metadata_keeps_its_order(tmp_path):
    """Where that of the package is a matter of chance."""
    metadata = {str(key): "value" for key in (5, 3, 9, 1, 7)}
    path = tmp_path / "x.safetensors"
    for _ in range(3):
        sio.save_safetensors({"x": torch.ones(3)}, path, metadata)
        assert path.read_bytes()[8:].startswith(
            b'{"__metadata__":{"5":"value","3":"value","9":"value","1":"value","7":'
        )
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([torch.uint8, torch.float16, torch.int64])),
        max_size=8,
    ),
    metadata=st.none()
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("aé\\"), max_size=1),
)
def test_same_bytes_of_anything(state, metadata, tmp_path, backend):
    assume(state or metadata != {})  # of which the package makes no JSON
    state = {name: filled(tuple(shape), dtype) for name, (shape, dtype) in state.items()}
    assert_same_file(state, tmp_path, backend, metadata)


@pytest.mark.parametrize(
    "options",
    [{"durable": False}, {"atomic": False}, {"progress": lambda done, total: None}],
    ids=["not durable", "in place", "progress"],
)
def test_options(options, tmp_path, backend):
    for _ in range(2):
        assert_same_file(STATES["large"], tmp_path, backend, **options)


def test_progress_counts_the_file(tmp_path, backend):
    told = []
    path = tmp_path / "x.safetensors"
    sio.save_safetensors(STATES["large"], path, backend=backend, progress=lambda *numbers: told.append(numbers))
    assert told == sorted(told) and {total for _, total in told} == {path.stat().st_size}
    assert told[-1][0] == path.stat().st_size


def test_targets(tmp_path, backend):
    state = STATES["large"]
    save_file(state, tmp_path / "ref")
    expected = (tmp_path / "ref").read_bytes()
    buffer = io.BytesIO()
    sio.save_safetensors(state, buffer, backend=backend)
    assert buffer.getvalue() == expected
    (tmp_path / "link").symlink_to("behind")
    sio.save_safetensors(state, os.fspath(tmp_path / "link"), backend=backend)
    assert (tmp_path / "behind").read_bytes() == expected and (tmp_path / "link").is_symlink()
    require_package("fsspec")
    import fsspec

    sio.save_safetensors(state, "memory://sdio/x.safetensors", backend=backend)
    with fsspec.open("memory://sdio/x.safetensors") as file:
        assert file.read() == expected


def test_a_conjugation_still_to_be_done_is_done(tmp_path, backend):
    """The package writes what lies in memory, and so another number."""
    x = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = {"conj": x.conj(), "neg": torch._neg_view(torch.tensor([1.0, -2.0]))}
    sio.save_safetensors(state, tmp_path / "x", backend=backend)
    found = load_file(tmp_path / "x")
    assert torch.equal(found["conj"], torch.tensor([1 - 2j, 3 + 4j], dtype=torch.complex64))
    assert torch.equal(found["neg"], torch.tensor([-1.0, 2.0]))


X = torch.arange(6.0)
# (state dict, metadata, what the message names)
REFUSED = {
    "a list": ([X], None, "list"),
    "a module": (torch.nn.Linear(1, 1), None, "state_dict()"),
    "no tensor": ({"a": X, "lr": 0.1}, None, "'lr'"),
    "a text": ({"a": "x"}, None, "'a'"),
    "sparse": ({"a": X, "s": torch.eye(2).to_sparse(), "t": torch.eye(2).to_sparse_csr()}, None, "s, t"),
    "shared": ({"a": X, "b": X[2:], "c": torch.ones(1)}, None, "a, b"),
    "tied": ({"head": X, "body": torch.ones(1), "emb": X}, None, "emb, head"),
    "not contiguous": ({"a": X, "b": torch.eye(3).t(), "c": torch.ones(2, 2)[:, :1]}, None, "b, c"),
    "complex128": ({"wide": torch.ones(1, dtype=torch.complex128)}, None, "'wide'"),
    "quantized": ({"q": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)}, None, "'q'"),
    "meta": ({"m": torch.empty(2, device="meta")}, None, "'m'"),
    "a number as name": ({1: X}, None, "1"),
    "half a character": ({"\ud800": X}, None, "ud800"),
    "metadata of numbers": ({"a": X}, {"step": 1}, "'step'"),
    "a list of metadata": ({"a": X}, ["x"], "metadata"),
    "half a character of metadata": ({"a": X}, {"k": "\ud800"}, "ud800"),
}


@pytest.mark.parametrize(("state", "metadata", "named"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_those_of_the_package_and_name_what_is_wrong(state, metadata, named, tmp_path, backend):
    _, reference = attempt(save_file, state, tmp_path / "ref", metadata=metadata)
    assert reference is not None
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    _, error = attempt(sio.save_safetensors, state, target, metadata, backend=backend)
    assert isinstance(error, type(reference)) and isinstance(error, sio.StateDictIOError), repr(error)
    assert named in str(error)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]


def test_the_name_of_the_metadata_is_refused(tmp_path):
    """The package writes such a file, and cannot read it."""
    with pytest.raises(sio.StateDictIOError, match="__metadata__"):
        sio.save_safetensors({"__metadata__": X}, tmp_path / "x")


def test_too_long_a_header_is_refused(tmp_path, monkeypatch):
    from statedict_io.formats import safetensors_format

    limits = [name for name in vars(safetensors_format) if name.endswith("MAX_HEADER_NBYTES")]
    monkeypatch.setattr(safetensors_format, *limits, 1000)
    with pytest.raises(sio.StateDictIOError, match=r"x\.safetensors: .* several files"):
        sio.save_safetensors({"n" * 1000: X}, tmp_path / "x.safetensors")


def test_errors_of_the_system_have_errno_and_path(tmp_path, backend):
    path = tmp_path / "missing" / "x.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        sio.save_safetensors({"x": X}, path, backend=backend)
    assert caught.value.filename == str(path)


def test_a_storage_that_is_resized_meanwhile(tmp_path, backend):
    """While it is read by the native backend torch refuses to; else the save does."""
    moving = torch.zeros(8 << 20, dtype=torch.uint8)
    path = tmp_path / "x.safetensors"

    def resize(done, total):
        moving.untyped_storage().resize_(10)

    with pytest.raises(RuntimeError, match="resiz"):
        sio.save_safetensors({"moving": moving[5:]}, path, backend=backend, progress=resize)
    assert not path.exists()


def test_the_package_is_not_needed(tmp_path, backend):
    save_file({"x": X}, tmp_path / "ref", metadata={"format": "pt"})
    program = f"""
import sys
sys.modules["safetensors"] = None
import torch, statedict_io as sio
sio.save_safetensors({{"x": torch.arange(6.0)}}, {str(tmp_path / "x")!r}, {{"format": "pt"}}, backend={backend!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "ref").read_bytes()


def test_a_wrong_option_is_named(tmp_path):
    with pytest.raises(TypeError, match="durable"):
        sio.save_safetensors({"x": X}, tmp_path / "x", durable="no")
    with pytest.raises(ValueError, match="backend"):
        sio.save_safetensors({"x": X}, tmp_path / "x", backend="fast")
    assert os.listdir(tmp_path) == []
