"""DCP's directories to files and back, against torch's own converters; in bounded memory."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from statedict_io.__main__ import main
from statedict_io.dcp import conversion

from . import scenarios
from .ranks import all_well, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


def state():
    torch.manual_seed(3)
    return {
        "model": {
            "w": torch.randn(37, 11),
            "h": torch.randn(5, 3).bfloat16(),
            "n": torch.tensor(3),
            "e": torch.empty(0, 2),
        },
        "optimizer": {"state": {"w": {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "epoch": 4,
    }


def test_directory_to_file(tmp_path, backend):
    dcp.save(state(), checkpoint_id=tmp_path / "dir", no_dist=True)
    conversion.dcp_to_file(tmp_path / "dir", tmp_path / "out.pt", backend=backend)
    dcp_to_torch_save(tmp_path / "dir", tmp_path / "stock.pt")
    assert scenarios.differences(torch.load(tmp_path / "stock.pt"), torch.load(tmp_path / "out.pt")) == []
    assert scenarios.differences(state(), torch.load(tmp_path / "out.pt")) == []


def save_directory(rank, world_size, directory):
    model, optimizer = scenarios.trained("fsdp", world_size)
    dcp.save(scenarios.training(model, optimizer), checkpoint_id=directory)


def test_directory_of_many_ranks_to_file(tmp_path):
    all_well(run_ranks(3, save_directory, str(tmp_path / "dir")))
    conversion.dcp_to_file(tmp_path / "dir", tmp_path / "out.pt")
    dcp_to_torch_save(tmp_path / "dir", tmp_path / "stock.pt")
    # Stock torch puts the names in the order of the ranks that wrote them.
    stock, ours = torch.load(tmp_path / "stock.pt"), torch.load(tmp_path / "out.pt")
    assert scenarios.differences(in_order(stock), in_order(ours)) == []
    assert list(ours["model"]) == list(scenarios.Net().state_dict())


def in_order(value):
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


def test_file_to_directory(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(conversion, "_CHUNK_NBYTES", 500)  # so that there are many
    torch.save(state(), tmp_path / "in.pt")
    conversion.file_to_dcp(tmp_path / "in.pt", tmp_path / "dir", backend=backend)
    assert len(dcp.FileSystemReader(tmp_path / "dir").read_metadata().state_dict_metadata["model.w"].chunks) > 1
    dcp_to_torch_save(tmp_path / "dir", tmp_path / "out.pt")
    assert scenarios.differences(state(), torch.load(tmp_path / "out.pt")) == []


def test_a_failed_conversion_leaves_the_old_file(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path / "dir", no_dist=True)
    torch.save("old", tmp_path / "out.pt")
    data = next(name for name in os.listdir(tmp_path / "dir") if name.endswith(".distcp"))
    os.truncate(tmp_path / "dir" / data, 100)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of it
        conversion.dcp_to_file(tmp_path / "dir", tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt") == "old"
    assert sorted(os.listdir(tmp_path)) == ["dir", "out.pt"]


_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from statedict_io.dcp import conversion
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
getattr(conversion, sys.argv[1])(sys.argv[2], sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_memory_is_bounded(tmp_path):
    tensors = {f"t{i}": torch.full((8 << 20,), float(i)) for i in range(12)}  # 384 MiB
    torch.save(tensors, tmp_path / "in.pt")
    for function, source, target in (("file_to_dcp", "in.pt", "dir"), ("dcp_to_file", "dir", "out.pt")):
        command = [sys.executable, "-W", "ignore", "-c", _PEAK, function, tmp_path / source, tmp_path / target]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert peak < 288 << 20, f"{function}: {peak >> 20} MiB"
    assert (tmp_path / "out.pt").stat().st_size > 384 << 20


def test_command_line_converts_both_ways(tmp_path):
    torch.save(state(), tmp_path / "in.pt")
    for names in (("in.pt", "dir"), ("dir", "out.pt")):
        assert main(["convert", *(str(tmp_path / name) for name in names)]) == 0
    assert scenarios.differences(state(), torch.load(tmp_path / "out.pt")) == []
