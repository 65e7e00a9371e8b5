"""What a file says is printed safely: every command, every place where text of a file or of its name appears."""

import contextlib
import io
import os
import zipfile

import pytest
import torch
from corpus_case import filled
from test_verification import flip, payloads

import statedict_io as sio
from statedict_io.__main__ import main

# Colours, a second line, C1 controls, text turned around, a letter that not every stream can take, a lone surrogate.
HOSTILE = "\x1b[31mred\n\x9b2J\u202egpj\u2028\u00e9\ud800"
FILE_NAME = "\x1b[32mgreen\n\u202e.pt"


def output(*arguments, encoding):
    """The exit code, and all that is printed, to streams that refuse what they cannot encode."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main(arguments)
        except SystemExit as e:
            code = e.code
    text = ""
    for stream in streams:
        stream.flush()
        text += stream.buffer.getvalue().decode(encoding)
    return code, text


def assert_safe(text, where):
    assert "Traceback" not in text, (where, text)
    wrong = sorted({c for c in text if c != "\n" and not c.isprintable()})
    assert wrong == [], (where, wrong)
    assert not any(line.startswith(("red", "gpj")) for line in text.splitlines()), (where, text)


def files(directory):
    torch.save({HOSTILE: filled(3), "n": {HOSTILE: "value"}}, directory / "model.pt")
    (directory / FILE_NAME).write_bytes((directory / "model.pt").read_bytes())
    damaged = directory / "damaged.pt"
    damaged.write_bytes((directory / "model.pt").read_bytes())
    flip(damaged, {name: start for name, start, _ in payloads(damaged)}["data/0"] + 1, 2)
    torch.save({HOSTILE: torch.eye(2).to_sparse()}, directory / "sparse.pt")
    (directory / "text.pt").write_bytes(HOSTILE.encode("utf-8", "surrogatepass") * 20)
    with zipfile.ZipFile(directory / "records.pt", "w") as archive:
        archive.writestr("\x1b[31mred\n/data.pkl", b"\x80\x02ccollections\n\x1b[31mred\n.")
        archive.writestr("\x1b[31mred\n/version", b"\x1b[31mred\n")
        archive.writestr("\x1b[31mred\n/\x9b2J\u202e", b"x")
    header = b'{"\\u001b[31mred\\n":{"dtype":"\\u001b[31mred\\n","shape":[1],"data_offsets":[0,4]}}'
    (directory / "named.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_command_prints_names_safely(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    shown = 0
    for name in sorted(os.listdir(tmp_path)):
        for arguments in (
            ["verify", name], ["inspect", name], ["inspect", "--json", name], ["verify", "--json", name],
            ["convert", name, "out.pt" if name.endswith(".safetensors") else "out.safetensors"],
        ):  # fmt: skip
            _, text = output(*arguments, encoding=encoding)
            assert_safe(text, arguments)
            shown += "\\x1b" in text
    assert shown > 8, "few of the outputs show a name: the check sees nothing"
    code, text = output("verify", "--\x1b[31mred", encoding=encoding)
    assert code == 2
    assert_safe(text, "arguments")


def test_the_benchmark_prints_its_directory_safely(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    directory = tmp_path / "[red]\x1b[31mred\n"
    directory.mkdir()
    code, text = output("bench", "--size", "1MiB", "--rounds", "1", "--dir", str(directory), encoding="utf-8")
    assert code == 0
    assert_safe(text, "bench")
    assert "[red]" in "".join(text.split())  # the title of a table is broken into lines


def test_names_in_problems_and_errors_are_escaped(tmp_path, backend):
    files(tmp_path)
    report = sio.verify(tmp_path / "damaged.pt", backend=backend)
    assert not report.ok
    assert all(line.isprintable() for line in report.problems), report.problems
