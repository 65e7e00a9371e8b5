"""The archive is named after the final file: it is part of the bytes, of every record's name."""

import os
import pathlib
import zipfile

import pytest
import torch
from corpus_case import filled
from oracle import assert_same_bytes, assert_same_file, names_in, two_directories

import statedict_io as sio

OBJ = {"weight": filled(4, 4), "bias": filled(3)}

NAMES = [
    "model.pt", "a.b.c", "noext", "q.", "q..", "..pt", "...", ".a.b", "..a", "a..b", "with space.pt", " ", " .pt",
    "tab\t.pt",
    "new\nline.pt", "UPPER.PT", "archive.pt", "data.pkl", "a.tar.gz", "-rf", "~", "*.pt", "%s.pt", "a:b.pt",
    "quote'\".pt", "#1.pt",
    "x" * 255, "x" * 252 + ".pt", "x" * 251 + ".a.b", "x" + "." + "y" * 253, "\x01.pt", "\x7f.pt",
    "PK\x07\x08.pt", "PK\x07\x08abcd.pt", "PK\x07\x08abcdefgh",
    "модель.pt", "é", "é.a.b", "ü" * 127, "é" * 126 + ".pt", "模型.pt", "😀.pt", "a\udcff.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_archive_is_named_after_the_file(name, backend, tmp_path):
    assert assert_same_file(tmp_path, OBJ, backend, name=name, load=not name.isspace()) is None


@pytest.mark.parametrize("name", [".pt", ".hidden", ".", "\\", "a\\.pt"])
def test_names_that_torch_refuses_leave_the_directory_empty(name, backend, tmp_path):
    assert assert_same_file(tmp_path, OBJ, backend, name=name) is not None


@pytest.mark.parametrize(
    ("name", "archive"),
    [("model.pt", "model"), ("a.b.c", "a.b"), ("noext", "noext"), ("q..", "q."), ("модель.pt", "archive")],
)
def test_records_carry_the_name_of_the_file_never_of_a_temporary(name, archive, backend, tmp_path):
    sio.save(OBJ, tmp_path / name, backend=backend)
    with zipfile.ZipFile(tmp_path / name) as file:
        assert {record.split("/")[0] for record in file.namelist()} == {archive}


@pytest.mark.parametrize(
    "spelling",
    [
        "model.pt",
        "./model.pt",
        "sub/model.pt",
        "sub//model.pt",
        "sub/./model.pt",
        "sub/../model.pt",
        "sub\\model.pt",
        "..model.pt",
        "./sub/a.b/model",
    ],
)
def test_relative_paths(spelling, backend, tmp_path, monkeypatch):
    errors = []
    for directory, save in zip(two_directories(tmp_path), (torch.save, sio.save), strict=True):
        (directory / "sub" / "a.b").mkdir(parents=True)
        monkeypatch.chdir(directory)
        try:
            save(OBJ, spelling, **({} if save is torch.save else {"backend": backend}))
        except RuntimeError as error:
            errors.append(str(error).split("\n")[0])
    ref, ours = two_directories(tmp_path)
    written = [sorted(str(p.relative_to(d)) for p in d.rglob("*")) for d in (ref, ours)]
    assert written[0] == written[1]
    if errors:
        assert len(errors) == 2 and errors[0] in errors[1]
    else:
        path = next(p for p in ref.rglob("*") if p.is_file())
        assert_same_bytes(path, ours / path.relative_to(ref))


def test_a_backslash_ends_the_directory_part_as_in_torch(backend, tmp_path, monkeypatch):
    for directory in two_directories(tmp_path):
        (directory / "a").mkdir()
    ref, ours = two_directories(tmp_path)
    monkeypatch.chdir(ref)
    torch.save(OBJ, "a\\b.pt")
    monkeypatch.chdir(ours)
    sio.save(OBJ, "a\\b.pt", backend=backend)
    assert names_in(ours) == names_in(ref) == ["a", "a\\b.pt"]
    assert_same_bytes(ref / "a\\b.pt", ours / "a\\b.pt")


def test_an_absolute_path_with_a_non_ascii_directory(backend, tmp_path):
    for directory in two_directories(tmp_path):
        (directory / "Größe").mkdir()
    assert (
        assert_same_file(tmp_path, OBJ, backend, name=os.path.join("Größe", "plain.pt"), durable=(), load=False) is None
    )
    ref, ours = two_directories(tmp_path)
    sio.save(OBJ, ours / "Größe" / "plain.pt", backend=backend)
    assert_same_bytes(ref / "Größe" / "plain.pt", ours / "Größe" / "plain.pt")
    assert names_in(ours / "Größe") == ["plain.pt"]


def test_a_path_of_more_than_a_thousand_characters(backend, tmp_path):
    ref, ours = (pathlib.Path(directory, *["d" * 200] * 8) for directory in two_directories(tmp_path))
    ref.mkdir(parents=True)
    ours.mkdir(parents=True)
    torch.save(OBJ, ref / "model.pt")
    sio.save(OBJ, ours / "model.pt", backend=backend)
    assert_same_bytes(ref / "model.pt", ours / "model.pt")
    assert names_in(ours) == ["model.pt"]


def test_through_a_symlink_the_name_is_the_links(backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    for directory in (ref, ours):
        (directory / "real.bin").write_bytes(b"old")
        (directory / "link.pt").symlink_to("real.bin")
    torch.save(OBJ, ref / "link.pt")
    sio.save(OBJ, ours / "link.pt", backend=backend)
    assert (ours / "link.pt").is_symlink()
    assert_same_bytes(ref / "real.bin", ours / "real.bin")
    assert names_in(ours) == ["link.pt", "real.bin"]
