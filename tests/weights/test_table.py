"""Each cell of the table at the top of docs/weight-files.md."""

import pathlib
import pickle

import pytest
import torch
from oracle import names_in

import statedict_io as sio
from statedict_io.__main__ import main

from .test_conversions import OTHERS, TENSORS, write_dcp, write_shards
from .test_legacy import tar_of

package = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TRUSTS = "¹"


def table():
    """(row, column) -> what the page says."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "weight-files.md"
    lines = page.read_text().partition("| | torch zip |")[2].partition("\n\n")[0].splitlines()
    columns = ["torch zip", *(cell.strip() for cell in lines[0].strip(" |").split("|"))]
    cells = [[cell.strip() for cell in line.strip(" |").split("|")] for line in lines[2:]]
    return {(row[0], column): said for row in cells for column, said in zip(columns, row[1:], strict=True)}


KINDS = {
    "torch zip": lambda path: torch.save({**TENSORS, **OTHERS}, path),
    "safetensors": lambda path: package.save_file(TENSORS, path),
    "folder, index of shards": lambda path: write_shards(path, ".safetensors"),
    "legacy": lambda path: torch.save({**TENSORS, **OTHERS}, path, _use_new_zipfile_serialization=False),
    "tar": lambda path: tar_of({"a.w": TENSORS["a.w"], "c": torch.ones(3)}, path),
    "DCP directory": lambda path: write_dcp(path, {**TENSORS, **OTHERS}),
}


def lazily(path, trust):
    with sio.open_checkpoint(path, weights_only=not trust) as ckpt:
        return ckpt["a.w"]


def command(*words):
    """Runs one and raises where it fails."""

    def run(path, trust):
        places = {"F": str(path), "OUT": str(path.parent)}
        arguments = [word.format_map(places) for word in words[1:]]
        if main([words[0], *(["--trust"] if trust else []), *arguments]) != 0:
            raise sio.StateDictIOError(words[0])

    return run


ROWS = {
    "`sio.load`": [lambda path, trust: sio.load(path, weights_only=not trust)["a.w"]],
    "`sio.open_checkpoint`": [lazily],
    "`sio.diff`, `statedict-io diff`": [
        lambda path, trust: sio.diff(path, path, weights_only=not trust), command("diff", "{F}", "{F}"),
    ],
    "`statedict-io inspect`": [command("inspect", "{F}")],
    "`sio.verify`, `statedict-io verify`": [lambda path, trust: sio.verify(path), command("verify", "{F}")],
    "`statedict-io convert` to `.safetensors`": [command("convert", "{F}", "{OUT}/out.safetensors")],
    "`statedict-io convert` to shards": [command("convert", "--max-shard-size", "900", "{F}", "{OUT}/out")],
    "`statedict-io convert` to `.pt`": [command("convert", "{F}", "{OUT}/out.pt")],
    "`statedict-io convert` to a DCP directory": [command("convert", "{F}", "{OUT}/out/")],
}  # fmt: skip


def test_the_table_is_the_one_that_is_tested():
    rows, columns = zip(*table(), strict=True)
    assert set(rows) == ROWS.keys() and set(columns) == KINDS.keys()


@pytest.mark.parametrize(("row", "kind"), table())
def test_a_cell(row, kind, tmp_path, capsys):
    said = table()[row, kind]
    path = tmp_path / "file"
    KINDS[kind](path)
    before = names_in(tmp_path)
    for action in ROWS[row]:
        if said == "no":
            with pytest.raises((sio.StateDictIOError, OSError, pickle.UnpicklingError)):
                action(path, False)
            assert names_in(tmp_path) == before
        else:
            action(path, said.endswith(TRUSTS))
            if said.endswith(TRUSTS):
                with pytest.raises((sio.StateDictIOError, RuntimeError, pickle.UnpicklingError)):
                    action(path, False)
