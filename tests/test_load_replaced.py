"""load of a file that is replaced at the worst moment: what it returns, and has verified, is one file."""

import builtins
import itertools
import os

import pytest
import torch
from corpus_case import filled
from equality import difference

import statedict_io as sio
from statedict_io.reading import loading

OLD, NEW = {"a": filled(4000, seed=1)}, {"more": filled(9000, seed=2), "a": filled(50, seed=3)}


@pytest.fixture(params=["rebound", "as it is"])
def torch_code(request, monkeypatch):
    """Whether parts of the installed torch.load can be exchanged."""
    if request.param == "as it is":
        monkeypatch.setattr(loading, "can_rebind", lambda: False)
    return request.param


def replace(path, obj):
    torch.save(obj, f"{path}.new")
    os.replace(f"{path}.new", path)


@pytest.fixture
def replaced_when_mapped(monkeypatch):
    """replaced_when_mapped(path, versions): put in place one after the other, each just before the path is mapped."""

    def prepare(path, versions):
        versions = iter(versions)
        from_file = torch.UntypedStorage.from_file

        def replace_and_map(*arguments, **options):
            for version in versions:
                replace(path, version)
                break
            return from_file(*arguments, **options)

        monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(replace_and_map))

    return prepare


@pytest.mark.parametrize("versions", [(OLD, NEW), (NEW, OLD), (OLD, NEW, OLD, NEW)])
def test_what_is_mapped_is_what_was_opened(tmp_path, backend, torch_code, replaced_when_mapped, versions):
    path = tmp_path / "model.pt"
    replace(path, versions[0])
    replaced_when_mapped(path, versions[1:])
    assert difference(sio.load(path, mmap=True, verify=True, backend=backend), versions[-1]) is None


def test_without_verification_too(tmp_path, backend, replaced_when_mapped):
    path = tmp_path / "model.pt"
    replace(path, OLD)
    replaced_when_mapped(path, [NEW])
    assert difference(sio.load(path, mmap=True, backend=backend), NEW) is None


def test_what_is_mapped_is_verified(tmp_path, backend, torch_code, replaced_when_mapped):
    """The file that was opened first is sound, the one that is mapped is not."""
    path = tmp_path / "model.pt"
    replace(path, OLD)
    damaged = tmp_path / "damaged.pt"
    torch.save(NEW, damaged)
    data = bytearray(damaged.read_bytes())
    data[data.find(NEW["a"].numpy().tobytes()) + 5] ^= 1
    damaged.write_bytes(data)
    from_file = torch.UntypedStorage.from_file

    def replace_and_map(*arguments, **options):
        if damaged.exists():
            damaged.replace(path)
        return from_file(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", staticmethod(replace_and_map))
        with pytest.raises(sio.CorruptCheckpointError, match="data/1"):
            sio.load(path, mmap=True, verify=True, backend=backend)


def test_it_ends(tmp_path, backend, torch_code, replaced_when_mapped):
    path = tmp_path / "model.pt"
    replace(path, OLD)
    replaced_when_mapped(path, [NEW, OLD] * 200)
    with pytest.raises(sio.StateDictIOError, match=r"model\.pt: was replaced each of the 100 times.*mmap=False"):
        sio.load(path, mmap=True, verify=True, backend=backend)
    assert path.exists()


def test_errors_of_a_file_that_stays_are_raised(tmp_path, backend, torch_code):
    path = tmp_path / "model.pt"
    replace(path, {"a": filled(3), "b": slice(1)})
    with pytest.raises(Exception, match="Weights only load failed"):
        sio.load(path, mmap=True, verify=True, backend=backend)


@pytest.mark.parametrize("opening", [0, 1, 2])
def test_a_legacy_file_is_never_taken_for_verified(tmp_path, backend, torch_code, monkeypatch, opening):
    """It takes the place of an archive before the path is opened for the first, second, third time."""
    path = tmp_path / "model.pt"
    replace(path, OLD)
    torch.save(NEW, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    open_file = builtins.open
    openings = itertools.count()

    def replace_and_open(file, *arguments, **options):
        if str(file) == str(path) and next(openings) == opening:
            os.replace(tmp_path / "legacy.pt", path)
        return open_file(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", replace_and_open)
    try:
        found = sio.load(path, verify=True, backend=backend)
    except ValueError as e:
        assert "legacy format, which has no checksums" in str(e)
    else:
        assert opening > 0 and difference(found, OLD) is None


def test_without_rebinding_everything_that_is_verified_loads(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(loading, "can_rebind", lambda: False)
    path = tmp_path / "model.pt"
    torch.save(OLD, path)
    with open(path, "rb") as file:
        for source in (path, str(path), file):
            assert difference(sio.load(source, verify=True, backend=backend), OLD) is None
