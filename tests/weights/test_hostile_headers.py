"""Hostile safetensors headers: accepted and refused as the safetensors package does, and in bounded memory."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from oracle import attempt

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.formats import safetensors_parsed

from .headers import HEADERS, OURS_ALONE

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")
FUZZ = pathlib.Path(__file__).parents[1] / "fuzz" / "header_fuzz.py"


def test_there_are_enough_kinds():
    assert len(HEADERS) > 150


@pytest.mark.parametrize("kind", HEADERS)
def test_what_the_package_reads_is_read_and_nothing_else(kind, backend, tmp_path):
    content = HEADERS[kind]()
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    expected, refusal = attempt(safetensors.deserialize, content)
    report = sio.verify(path, backend=backend)
    found, error = attempt(sio.load, path, backend=backend)
    if kind in OURS_ALONE:
        assert refusal is None and isinstance(error, sio.CorruptCheckpointError)
    elif refusal is not None:
        assert isinstance(error, sio.CorruptCheckpointError), error
        assert str(path) in str(error) and len(str(error)) < 1000
        assert not report.ok
        with pytest.raises(sio.CorruptCheckpointError):
            sio.open_checkpoint(path, backend=backend)
    else:
        assert report.ok, report.problems
        tensors = safetensors_parsed.parse(lambda at, n: content[at : at + n], len(content), "it").tensors
        assert {name: [t.dtype, [*t.shape], content[t.begin : t.end]] for name, t in tensors.items()} == {
            name: [its["dtype"], its["shape"], bytes(its["data"])] for name, its in expected
        }
        reference, cannot = attempt(safetensors.torch.load_file, path)
        if cannot is not None:
            assert isinstance(error, sio.StateDictIOError) and str(path) in str(error)
            with sio.open_checkpoint(path, backend=backend) as ckpt:
                assert ckpt.refused and not list(ckpt)
        else:
            assert {name: bits(t) for name, t in found.items()} == {name: bits(t) for name, t in reference.items()}


def bits(tensor):
    elements = tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []
    return tensor.dtype, tensor.shape, elements


@pytest.mark.parametrize("kind", ["a gap", "overlap", "cut off", "a name that steers a terminal", "dtype 'F99', 3"])
def test_commands_say_what_is_wrong(kind, tmp_path, capsys):
    kind = "offsets: a gap" if kind == "a gap" else kind
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[kind]())
    codes = [main([command, str(path)]) for command in ("inspect", "verify")]
    codes.append(main(["convert", str(path), str(tmp_path / "out.pt")]))
    said = capsys.readouterr()
    assert codes == ([0, 0, 0] if kind.startswith("a name") else [2, 1, 2])
    assert "\x1b" not in said.out + said.err
    assert str(path) in said.out


def fuzz(num_runs, timeout_s):
    done = subprocess.run(
        [sys.executable, FUZZ, "--runs", str(num_runs)], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_some_random_headers(report_counts):
    found = fuzz(3000, 280)
    assert found["accepted"] > 100 and found["refused"] > 1000
    report_counts(f"random safetensors headers: {found}")


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_many_random_headers(report_counts):
    report_counts(f"random safetensors headers: {fuzz(200_000, 4 * 3600)}")
