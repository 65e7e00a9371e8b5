"""Files that are no checkpoints in torch's zip format: every reader names what they are, none calls them damaged."""

import gzip
import importlib.metadata
import io
import pickle
import re
import tarfile
import zipfile

import pytest
import torch
from corpus_case import filled
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:'torch.load' received")

STATE = {"w": filled(300)}


def saved(obj=STATE, **options):
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def zipped(records, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def package():
    file = io.BytesIO()
    with torch.package.PackageExporter(file) as exporter:
        exporter.save_pickle("model", "model.pkl", STATE)
    return file.getvalue()


def scripted(*, mobile=False):
    module = torch.jit.script(torch.nn.Linear(2, 3))
    return module._save_to_buffer_for_lite_interpreter() if mobile else bytes(module.save_to_buffer())


def exported():
    file = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), file)
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"

#: what is said of the file -> its content
FOREIGN = {
    "torch.package": package,
    "exported program": exported,
    "zip archive that torch.save did not write": lambda: zipped({"a.txt": "text"}),
    "that torch.save did not write": lambda: zipped({"folder/a.txt": "text" * 100}, compression=zipfile.ZIP_LZMA),
    "zip archive that torch": lambda: zipped({}),
    "NumPy arrays": lambda: zipped({"a.npy": "x", "b.npy": "y"}),
    "tar archive": tar,
    "git LFS": lambda: LFS,
    "web page": lambda: b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>",
    "a web page": lambda: b"<html><head>",
    "gzip": lambda: gzip.compress(saved()),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(2000),
    "GGUF": lambda: b"GGUF\3\0\0\0" + bytes(100),
    "NumPy array ": lambda: b"\x93NUMPY\1\0" + bytes(120),
    "plain pickle": lambda: pickle.dumps({"a": 1}),
    "JSON": lambda: b'{\n  "architectures": ["Llama"]\n}',
}
#: whose records verify can check like those of a checkpoint
SCRIPTS = {"TorchScript": scripted, "mobile interpreter": lambda: scripted(mobile=True)}
DAMAGED = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(5000),
    "the first bytes of an archive": lambda: b"PK",
    "half": lambda: saved()[:1000],
    "its first bytes are others": lambda: b"\xa5" * 16 + saved()[16:],
    "its first bytes are zeros": lambda: bytes(16) + saved()[16:],
    "its end is zeros": lambda: saved()[:-100] + bytes(100),
    "half a legacy file": lambda: saved(_use_new_zipfile_serialization=False)[:700],
    "the beginning of a legacy file": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 0) + b"I1001\n.",
}


@pytest.mark.parametrize("what", [*FOREIGN, *SCRIPTS])
def test_every_reader_names_the_kind(what, backend, tmp_path, capsys):
    path = tmp_path / "model.pt"
    path.write_bytes({**FOREIGN, **SCRIPTS}[what]())
    named = re.escape(str(path)) + r": is .*" + re.escape(what.removeprefix("the "))
    with pytest.raises(sio.FileKindError, match=named) as caught:
        sio.open_checkpoint(path, backend=backend)
    assert not isinstance(caught.value, sio.CorruptCheckpointError)
    commands = [["inspect"], ["convert", str(tmp_path / "out.safetensors")], ["convert", str(tmp_path / "dir/")]]
    if what in FOREIGN:
        commands.append(["verify"])
        with pytest.raises(sio.FileKindError, match=named):
            sio.verify(path, backend=backend)
    else:
        assert sio.verify(path, backend=backend).ok and main(["verify", str(path)]) == 0
    for name, *rest in commands:
        assert main([name, str(path), *rest]) == 2
        complaint = capsys.readouterr().err
        assert re.search(named, complaint) and "damaged or incomplete" not in complaint
    assert names_in(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("what", DAMAGED)
def test_what_may_be_a_damaged_checkpoint_is_called_damaged(what, backend, tmp_path, capsys):
    path = tmp_path / "model.pt"
    path.write_bytes(DAMAGED[what]())
    report = sio.verify(path, backend=backend)
    assert not report.ok and report.is_known
    assert main(["verify", str(path)]) == 1
    with pytest.raises(sio.CorruptCheckpointError) as caught:
        sio.open_checkpoint(path, backend=backend)
    assert not isinstance(caught.value, sio.FileKindError)


def test_what_no_kind_is_recognized_in(backend, tmp_path, capsys):
    path = tmp_path / "model.pt"
    path.write_bytes(b"text" * 100)
    report = sio.verify(path, backend=backend)
    assert not report.ok and not report.is_known
    assert main(["verify", str(path)]) == 2 and "no checkpoint" not in capsys.readouterr().out
    with pytest.raises(sio.CorruptCheckpointError) as caught:
        sio.open_checkpoint(path, backend=backend)
    assert isinstance(caught.value, sio.FileKindError)


@pytest.mark.parametrize("what", [*FOREIGN, *SCRIPTS])
def test_load_reads_what_torch_reads_and_names_the_rest(what, backend, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes({**FOREIGN, **SCRIPTS}[what]())
    for weights_only in (True, False):
        try:
            expected = torch.load(path, weights_only=weights_only)
        except Exception as e:
            with pytest.raises(type(e)) as caught:
                sio.load(path, weights_only=weights_only, backend=backend)
            explained = isinstance(caught.value, sio.FileKindError)
            assert explained or what in SCRIPTS or what == "tar archive"
            if explained:
                assert what in str(caught.value) and str(path) in str(caught.value)
        else:
            assert type(sio.load(path, weights_only=weights_only, backend=backend)) is type(expected)


def test_files_of_a_dcp_directory(backend, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save({"a": filled(3), "b": filled(4)}, checkpoint_id=tmp_path / "dir", no_dist=True)
    (path,) = (tmp_path / "dir").glob("*.distcp")
    with pytest.raises(sio.FileKindError, match=r"torch\.distributed\.checkpoint: .*convert DIRECTORY"):
        sio.verify(path, backend=backend)
    (tmp_path / "dir" / ".metadata").rename(tmp_path / "metadata")
    with pytest.raises(sio.FileKindError, match="plain pickle"):
        sio.verify(tmp_path / "metadata", backend=backend)


def test_convert_of_what_is_only_named_safetensors(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    for content, what in (
        (LFS, "git LFS"),
        (exported(), "exported program"),
        (b"text", "shorter than the header of a safetensors file"),
    ):
        path.write_bytes(content)
        assert main(["convert", str(path), str(tmp_path / "out.pt")]) == 2
        assert what in capsys.readouterr().err and names_in(tmp_path) == ["model.safetensors"]


class Foreign:
    pass


def test_a_foreign_class_is_named_with_our_own_option(backend, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(Foreign(), path)
    with pytest.raises(pickle.UnpicklingError) as caught:
        sio.open_checkpoint(path, backend=backend)
    said = [str(caught.value)]
    commands = [["inspect"], ["convert", str(tmp_path / "out.safetensors")], ["convert", str(tmp_path / "dir/")]]
    for name, *rest in commands:
        assert main([name, str(path), *rest]) == 2
        said.append(capsys.readouterr().err)
    for text in said:
        assert str(path) in text and f"{Foreign.__module__}.Foreign" in text
        assert "weights_only=False" in text and "torch.load" not in text and "\x1b" not in text and len(text) < 1000


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_nothing_is_saved_as_safetensors(options, backend, tmp_path):
    from statedict_io.dcp import SingleFileWriter

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    for save in (sio.save, sio.fastsave, sio.save_async):
        for given in (path, str(path), f"file://{path}"):
            with pytest.raises(sio.FileKindError, match=r"model\.safetensors: .*statedict_io\.save_safetensors.*\.pt"):
                save(STATE, given, backend=backend, **options)
    with pytest.raises(sio.FileKindError, match="save_safetensors"):
        SingleFileWriter(path, backend=backend)
    writer = SingleFileWriter(tmp_path / "model.pt", backend=backend)
    with pytest.raises(sio.FileKindError, match="save_safetensors"):
        writer.reset(path)
    assert names_in(tmp_path) == ["model.safetensors"] and path.read_bytes() == b"old"
    with open(tmp_path / "object.safetensors", "wb") as file:  # the caller's own business
        sio.save(STATE, file, backend=backend, **options)
    assert torch.equal(sio.load((tmp_path / "object.safetensors").open("rb"))["w"], STATE["w"])


@pytest.mark.parametrize("form", ["plain", "lambda", "patch"])
def test_torch_save_writes_under_any_name_whoever_does_it(form, tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "model.safetensors")
    expected = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "ours").mkdir()
    path = tmp_path / "ours" / "model.safetensors"
    with monkeypatch.context() as patched:
        if form == "patch":
            with sio.patch_torch():
                torch.save(STATE, path)
                with pytest.raises(sio.FileKindError):
                    sio.save(STATE, path)
        else:
            patched.setattr(torch, "save", sio.save if form == "plain" else lambda *a, **k: sio.save(*a, **k))
            torch.save(STATE, path)
    assert path.read_bytes() == expected
    with pytest.raises(sio.FileKindError):
        sio.save(STATE, path)


def test_version(capsys):
    assert re.fullmatch(r"\d+\.\d+\.\d+", sio.__version__)
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and f"statedict-io {sio.__version__}" in capsys.readouterr().out
    try:
        installed = importlib.metadata.version("statedict-io")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed.partition("+")[0] == sio.__version__
