"""statedict-io inspect, verify, convert: output and exit codes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from corpus_case import filled
from equality import difference
from oracle import names_in
from test_verification import flip, payloads

import statedict_io as sio
from statedict_io.__main__ import main

ROOT = pathlib.Path(sio.__file__).parent.parent


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "statedict_io", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def model(tmp_path):
    obj = {"layers": {"0.weight": filled(30, 20), "0.bias": filled(20, dtype=torch.bfloat16)}, "epoch": 3}
    torch.save(obj, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_info_is_what_the_function_says_line_by_line():
    done = run("info")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == f"backend: {sio.backend_info().name} ({sio.backend_info().reason})"
    assert len(done.stdout.splitlines()) == len(str(sio.backend_info()).splitlines()) > 5


def damaged(path):
    other = path.with_name("damaged.pt")
    other.write_bytes(path.read_bytes())
    start = {record: start for record, start, _ in payloads(other)}
    flip(other, start["data/0"] + 7, 2)
    return other


def test_verify_exit_codes(model, tmp_path, capsys):
    bad, missing = damaged(model), tmp_path / "missing.pt"
    assert main(["verify", str(model)]) == 0
    assert "ok" in capsys.readouterr().out
    assert main(["verify", str(bad)]) == 1
    out = capsys.readouterr().out
    assert "damaged.pt" in out and "data/0" in out and "layers.0.weight" in out
    assert main(["verify", str(missing)]) == 2
    assert "missing.pt" in capsys.readouterr().err
    assert main(["verify", str(model), str(missing)]) == 2
    assert main(["verify", str(missing), str(bad), str(model)]) == 1, "a corrupt file must not be hidden by another"


def test_verify_json(model, capsys):
    assert main(["verify", "--json", str(model), str(damaged(model))]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["ok"] and {r["status"] for r in first["records"]} == {"ok"}
    assert not second["ok"] and [r["name"] for r in second["records"] if r["status"] == "corrupt"] == ["data/0"]


def test_verify_in_a_process_of_its_own(model):
    done = run("verify", model)
    assert done.returncode == 0 and done.stderr == "" and "ok" in done.stdout
    assert run("verify", damaged(model)).returncode == 1
    assert run("verify").returncode == 2


def test_inspect(model, capsys):
    assert main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("layers.0.weight"))
    with sio.open_checkpoint(model) as checkpoint:
        info = checkpoint.info("layers.0.weight")
    assert row == ["layers.0.weight", "float32", "30", "x", "20", "2400", str(info.offset)]
    text = "\n".join(lines)
    assert "2 tensors, 2440 bytes" in text and "epoch" in text and "alignment 64" in text


def test_inspect_json(model, capsys):
    assert main(["inspect", "--json", str(model)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(t["name"], t["dtype"], t["shape"], t["nbytes"], t["record"]) for t in found["tensors"]] == [
        ("layers.0.weight", "float32", [30, 20], 2400, "data/0"), ("layers.0.bias", "bfloat16", [20], 40, "data/1"),
    ]  # fmt: skip
    assert found["totals"] == {"tensors": 2, "nbytes": 2440, "by_dtype": {"float32": 2400, "bfloat16": 40}}
    assert found["others"] == ["epoch"] and found["format"]["crc"] == "recorded"


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    torch.save({"\x1b[31mred\n": filled(3), "[bold]x[/bold]": filled(2)}, tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31mred\\n" in out and "[bold]x[/bold]" in out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals")
def test_a_rich_table_on_a_terminal(model):
    import pty

    pytest.importorskip("rich")
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "statedict_io", "inspect", str(model)], stdout=child, stderr=child, env=environment
    )
    os.close(child)
    out = b""
    try:
        while chunk := os.read(parent, 4096):
            out += chunk
    except OSError:  # the terminal's end
        pass
    assert process.wait() == 0
    assert "━" in out.decode() and "layers.0.weight" in out.decode()
    os.close(parent)


def test_without_rich_and_tqdm(model, tmp_path):
    for name in ("rich", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for command in ("inspect", "verify"):
        assert run(command, model, PYTHONPATH=path).returncode == 0


def test_convert_there_and_back(model, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    assert main(["convert", str(model), str(tmp_path / "m.safetensors")]) == 0
    assert "epoch" in capsys.readouterr().err
    tensors = {"layers.0.weight": filled(30, 20), "layers.0.bias": filled(20, dtype=torch.bfloat16)}
    assert difference(safetensors.load_file(tmp_path / "m.safetensors"), tensors) in (
        None, difference(dict(reversed(tensors.items())), tensors))  # fmt: skip
    safetensors.save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()

    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "back.pt")]) == 0
    (tmp_path / "ref").mkdir()
    torch.save(safetensors.load_file(tmp_path / "m.safetensors"), tmp_path / "ref" / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "ref" / "back.pt").read_bytes()
    assert sio.verify(tmp_path / "back.pt").ok


@pytest.mark.parametrize("destination", ["out.safetensors", "directory/"])
def test_convert_takes_no_damage_into_a_format_without_checksums(model, tmp_path, capsys, destination):
    bad = damaged(model)
    before = sorted(os.listdir(tmp_path))
    assert main(["convert", str(bad), os.path.join(tmp_path, destination)]) == 2
    err = capsys.readouterr().err
    assert "damaged.pt" in err and "data/0" in err and "layers.0.weight" in err
    assert sorted(os.listdir(tmp_path)) == before


def test_convert_all_layouts_and_dtypes(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    from statedict_io.formats.safetensors_format import NAMES

    obj = {str(dtype): filled(7, 5, dtype=dtype) for dtype in NAMES if dtype != torch.float8_e8m0fnu}
    base = filled(2000, 3000)
    obj |= {"t": base.t(), "part": base[5:500, 7:900], "conj": filled(40, 30, dtype=torch.complex64).conj()}
    obj |= {
        "none": filled(0, 3),
        "scalar": filled(1)[0],
        "expanded": filled(1, 9).expand(5, 9),
        "p": [torch.nn.Parameter(base)],
    }
    torch.save(obj, tmp_path / "m.pt")
    assert main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors")]) == 0
    assert "part" in capsys.readouterr().err, "what shared memory is named"
    found = safetensors.load_file(tmp_path / "m.safetensors")
    expected = {name: t.contiguous() for name, t in obj.items() if name != "p"} | {"p.0": base}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach().resolve_conj()
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*bits), name


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"s": torch.eye(3).to_sparse()}, "s "),
        ({"c": filled(3, dtype=torch.complex128)}, r"c \(torch.complex128\)"),
        ({"e": filled(1).expand(1 << 40)}, "many times"),
    ],
)
def test_what_safetensors_cannot_hold(obj, message, tmp_path, capsys):
    torch.save(obj, tmp_path / "m.pt")
    (tmp_path / "m.safetensors").write_bytes(b"old")
    assert main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors")]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "m.safetensors").read_bytes() == b"old" and names_in(tmp_path) == ["m.pt", "m.safetensors"]


SOUND = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (SOUND, b"1234567"), (SOUND, b"123456789"), (b"{", b""), (b"[]", b""), (b'{"a":5}', b""),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', b"1" * 12),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}', b"1234"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}', b""),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"1"), (b"\xff\xfe", b""), (b"[" * 100000, b""),
    ],
)  # fmt: skip
def test_unsound_safetensors(header, data, tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "m.pt")]) == 2
    assert "m.safetensors" in capsys.readouterr().err and names_in(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("nbytes", [0, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_longer_than_the_file(nbytes, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(nbytes.to_bytes(8, "little") + b"{}")
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "m.pt")]) == 2


def test_convert_refuses_what_it_cannot_replace(model, tmp_path, capsys):
    for source, destination in (("a.safetensors", "b.safetensors"), (model, "/dev/null")):
        assert main(["convert", str(source), str(destination)]) == 2
    assert main(["convert", str(tmp_path / "missing.pt"), str(tmp_path / "m.safetensors")]) == 2
    assert "missing.pt" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "missing.pt")]) == 2
