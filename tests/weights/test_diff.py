"""`diff`: which tensors of two checkpoints differ, and how far apart they are."""

import json
import math

import pytest
import torch
from corpus_case import filled, random_bytes

import statedict_io as sio
from statedict_io.__main__ import main

package = pytest.importorskip("safetensors.torch")


def base():
    torch.manual_seed(19)
    return {
        "w": torch.randn(300, 70),
        "half": torch.randn(50).to(torch.bfloat16),
        "ids": torch.arange(40).reshape(5, 8),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
        "complex": torch.randn(6, dtype=torch.complex64),
        "f8": torch.randn(32).to(torch.float8_e4m3fn),
    }


def write(path, tensors):
    if path.suffix == ".safetensors":
        package.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return path


@pytest.fixture(params=[".pt", ".safetensors", ".pth"])
def suffix(request):
    return request.param


def compared(a, b, suffix, tmp_path, **options):
    first, second = write(tmp_path / "a.pt", a), write(tmp_path / f"b{suffix}", b)
    return sio.diff(first, second, **options)


def test_equal(suffix, backend, tmp_path):
    found = compared(base(), dict(reversed(base().items())), suffix, tmp_path, backend=backend)
    assert found.equal and found.num_compared == 7


def test_how_far_apart_values_are(suffix, backend, tmp_path):
    other = base()
    other["w"][7, 3] += 0.5
    other["w"][200, 1] *= 1.25
    other["ids"][4, 7] = -1
    other["flag"] = torch.tensor(False)
    other["complex"][2] += 3j
    found = {d.name: d for d in compared(base(), other, suffix, tmp_path, backend=backend).differences}
    assert found.keys() == {"w", "ids", "flag", "complex"} and {d.what for d in found.values()} == {"values"}
    a, b = base()["w"].double(), other["w"].double()
    assert found["w"].num_different == 2 and found["w"].max_abs == float((a - b).abs().max())
    assert found["w"].max_rel == pytest.approx(float(((a - b).abs() / torch.maximum(a.abs(), b.abs())).max()))
    assert (found["ids"].num_different, found["ids"].max_abs) == (1, 40.0) and found["ids"].max_rel == 40 / 39
    assert found["flag"].max_abs == 1.0 and found["complex"].max_abs == pytest.approx(3.0)


def test_missing_shapes_dtypes_and_kinds(backend, tmp_path):
    other = base()
    del other["w"]
    other |= {"half": other["half"].float(), "ids": other["ids"].reshape(8, 5), "flag": torch.eye(2).to_sparse()}
    other["new"] = torch.zeros(2)
    found = compared(base(), other, ".pt", tmp_path, backend=backend)
    assert [(d.name, d.what) for d in found.differences] == [
        ("w", "missing"), ("half", "dtype"), ("ids", "shape"), ("flag", "kind"), ("new", "missing"),
    ]  # fmt: skip
    assert found.differences[0].b is None and found.differences[-1].a is None and found.num_compared == 6
    assert found.differences[1].a.dtype == torch.bfloat16 and found.differences[2].b.shape == (8, 5)


def test_nan_and_infinity(suffix, backend, tmp_path):
    nan, inf = math.nan, math.inf
    a = {"same": torch.tensor([nan, inf, -inf, 0.0, 1.0]), "nan": torch.tensor([nan, 1.0]), "inf": torch.tensor([inf])}
    b = {"same": torch.tensor([-nan, inf, -inf, -0.0, 1.0]), "nan": torch.tensor([2.0, 1.0]), "inf": -a["inf"]}
    found = compared(a, b, suffix, tmp_path, backend=backend).differences
    assert [(d.name, d.num_different) for d in found] == [("nan", 1), ("inf", 1)]
    assert {(d.max_abs, d.max_rel) for d in found} == {(inf, inf)}


def test_large_integers_are_compared_exactly(backend, tmp_path):
    a = {"n": torch.tensor([1 << 62, 5]), "u": torch.tensor([1 << 62], dtype=torch.uint64)}
    b = {"n": torch.tensor([(1 << 62) + 1, 5]), "u": torch.tensor([(1 << 62) + 1], dtype=torch.uint64)}
    found = compared(a, b, ".pt", tmp_path, backend=backend).differences
    assert [(d.name, d.num_different) for d in found] == [("n", 1), ("u", 1)]


def test_other_layouts(backend, tmp_path):
    a = {"t": filled(40, 30, dtype=torch.int32), "s": torch.eye(4).to_sparse(), "p": torch.nn.Parameter(torch.ones(3))}
    b = {"t": a["t"].t().contiguous().t(), "s": torch.eye(4).to_sparse(), "p": torch.ones(3)}
    assert compared(a, b, ".pt", tmp_path, backend=backend).equal
    b["s"] = (2 * torch.eye(4)).to_sparse()
    assert [d.name for d in compared(a, b, ".pt", tmp_path, backend=backend).differences] == ["s"]


@pytest.mark.parametrize("shape", [(5 << 20,), (3, 3 << 20), (40, 1 << 17), (2, 2, 1 << 20), (1, 1, 5 << 20)])
def test_tensors_of_many_blocks(shape, backend, tmp_path):
    numel = math.prod(shape)
    a = {"w": random_bytes(4 * numel).view(torch.int32).reshape(shape)}
    b = {"w": a["w"].clone()}
    for at in (0, numel // 2, numel - 1):
        b["w"].view(-1)[at] ^= 1
    seen = []
    found = compared(a, b, ".safetensors", tmp_path, backend=backend, progress=lambda *done: seen.append(done))
    (difference,) = found.differences
    assert (difference.num_different, difference.max_abs) == (3, 1.0)
    assert seen == sorted(seen) and seen[-1] == (4 * numel, 4 * numel) and len(seen) > 2


def test_the_command(suffix, tmp_path, capsys):
    other = base()
    other["w"][0, 0] = math.nan
    a, b = write(tmp_path / "a.pt", base()), write(tmp_path / f"b{suffix}", other)
    assert main(["diff", str(a), str(a)]) == 0 and "7 tensors, all equal" in capsys.readouterr().out
    assert main(["diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "values" in out and "inf" in out and "1 differ, 6 are equal" in out
    assert main(["diff", "--json", str(a), str(b)]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["differences"][0]["name"] == "w" and found["differences"][0]["max_abs"] == "inf"
    assert (found["compared"], found["equal"]) == (7, False)
    assert main(["diff", str(a), str(tmp_path / "missing.pt")]) == 2 and "missing.pt" in capsys.readouterr().err
    b.write_bytes(b.read_bytes()[:100])
    assert main(["diff", str(a), str(b)]) == 2


class Foreign:
    def __init__(self):
        self.tensor = torch.ones(2)


def test_what_cannot_be_compared(backend, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "config": Foreign()}, path)
    with pytest.raises(sio.StateDictIOError, match=r"a\.pt: .*Foreign.*diff --trust"):
        sio.diff(path, path, backend=backend)
    with pytest.raises(sio.StateDictIOError, match=r"a\.pt: not all"):
        sio.diff(path, path, backend=backend, weights_only=False)
    torch.save({"w": torch.ones(2), "config": "text", "step": 5}, path)
    assert sio.diff(path, path, backend=backend).equal
