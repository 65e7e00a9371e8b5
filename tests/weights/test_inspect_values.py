"""`inspect` shows small values: what is no tensor, and tensors of one element."""

import json
import math

import pytest
import torch
from corpus_case import filled

from statedict_io.__main__ import main

VALUES = {"epoch": 7, "lr": 0.125, "name": "run\x1b[2J", "done": False, "best": None, "dtype": torch.bfloat16}


def state():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {**VALUES, "optimizer": optimizer.state_dict(), "nan": torch.tensor(math.nan), "w": filled(3)}


@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_shown(zipped, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    assert main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["values"]["epoch"] == "7" and found["values"]["lr"] == "0.125"
    assert found["values"]["best"] == "None" and found["values"]["dtype"] == "torch.bfloat16"
    assert found["values"]["optimizer.param_groups.0.lr"] == "0.5" and set(found["values"]) == set(found["others"])
    values = {t["name"]: t["value"] for t in found["tensors"] if "value" in t}
    assert values == {"optimizer.state.0.step": 1.0, "optimizer.state.1.step": 1.0, "nan": "nan"}
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "epoch = 7" in out and "lr = 0.125" in out and "\x1b" not in out
    (step,) = (line for line in out.splitlines() if line.startswith("optimizer.state.0.step"))
    assert step.split()[-1] == "1.0"


def test_large_values_are_cut(tmp_path, capsys):
    path = tmp_path / "model.pt"
    many = {f"v{i}": i for i in range(3000)}
    torch.save({"text": "x" * 100_000, "number": 1 << 2000, "set": {1, 2}, "w": filled(3), **many}, path)
    assert main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["values"]["text"]) < 400 and len(found["values"]) == 1000 and len(found["others"]) == 3003
    assert found["values"]["number"] == "an integer of 2001 bits" and found["values"]["set"] == "<set>"
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "and 2953 more" in out and len(out) < 10_000
