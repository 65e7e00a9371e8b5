"""Hostile archives: an exception, never a crash, a hang, or an allocation beyond the file's size."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import require_native
from equality import difference
from hostile import HOSTILE, SOUND_ARCHIVES, sound_archive, sound_object

import statedict_io as sio

TESTS = pathlib.Path(__file__).parent

#: what torch.load raises for such files too, by the unpickler's hand
UNPICKLERS = (
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    OverflowError,
)

# All of them in one process whose address space may grow by little: allocations larger than that fail there.
PROCESS = """
import json, pathlib, pickle, resource, struct, sys
sys.path[:0] = {path}
import torch, statedict_io as sio
from hostile import HOSTILE, sound_archive
backend, directory = sys.argv[1:]
sound = sound_archive()
path = pathlib.Path(directory, "model.pt")
path.write_bytes(sound)
def touch_all(path, **options):
    with sio.open_checkpoint(path, **options) as checkpoint:
        for name in checkpoint:
            checkpoint.info(name), checkpoint[name], checkpoint.get_slice(name)[..., :1]
actions = {{
    "load": sio.load,
    "load all": lambda path, **options: sio.load(path, weights_only=False, verify=True, **options),
    "meta": lambda path, **options: sio.load(path, map_location="meta", **options),
    "open": touch_all,
    "verify": sio.verify,
}}
for action in actions.values():  # threads and buffers are there
    action(path, backend=backend)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
found = {{}}
for name, damage in HOSTILE.items():
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # what making it takes is not the reader's
    path.write_bytes(damage(sound))
    resource.setrlimit(resource.RLIMIT_AS, (used + len(sound) + (64 << 20), most))
    for what, action in actions.items():
        try:
            result = action(path, backend=backend)
            found[f"{{what}}: {{name}}"] = ["ok", str(getattr(result, "ok", True)), repr(result)[:300]]
        except Exception as error:
            found[f"{{what}}: {{name}}"] = [c.__name__ for c in type(error).__mro__] + [str(error)[:300]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["native", "torch"])
def outcomes(request, tmp_path_factory):
    if request.param == "native":
        require_native()
    path = [str(TESTS), str(TESTS.parent)]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS.format(path=path), request.param, str(tmp_path_factory.mktemp("hostile"))],
        capture_output=True, text=True, timeout=250, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_the_archive_is_sound_before_it_is_damaged(backend, tmp_path):
    (tmp_path / "model.pt").write_bytes(sound_archive())
    assert difference(sio.load(tmp_path / "model.pt", verify=True, backend=backend), sound_object()) is None
    assert sio.verify(tmp_path / "model.pt", backend=backend).ok


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, outcomes):
    for what in ("load", "load all", "open"):
        kinds = outcomes[f"{what}: {name}"]
        if name == "twice the same file":
            continue  # the second directory's offsets are right for the first file
        assert kinds[0] != "ok", f"{what} returned"
        assert "MemoryError" not in kinds, f"{what}: {kinds}"
        assert (
            "CorruptCheckpointError" in kinds
            or any(kind.__name__ in kinds for kind in UNPICKLERS)
            or ("UnpicklingError" in kinds)
        ), f"{what}: {kinds}"
        assert "not enough memory" not in kinds[-1] and "can't allocate" not in kinds[-1], f"{what}: {kinds}"
    kinds = outcomes[f"verify: {name}"]
    assert kinds[0] == "ok", f"verify raised {kinds}"
    assert kinds[1] == str(name in SOUND_ARCHIVES), f"verify: {kinds}"


def test_structural_damage_names_the_file_and_the_cure(backend, tmp_path):
    (tmp_path / "model.pt").write_bytes(HOSTILE["header behind the end"](sound_archive()))
    with pytest.raises(sio.CorruptCheckpointError, match=r"model\.pt.*data/0.*copy it again") as caught:
        sio.load(tmp_path / "model.pt", backend=backend)
    assert isinstance(caught.value, RuntimeError), "torch.load raises a RuntimeError there"
    with pytest.raises(sio.CorruptCheckpointError, match=r"model\.pt.*data/0"):
        sio.open_checkpoint(tmp_path / "model.pt", backend=backend)


def test_containers_nested_to_billions_of_names(backend, tmp_path):
    inner = [torch.ones(1)]
    for _ in range(40):
        inner = [inner, inner]
    torch.save(inner, tmp_path / "model.pt")
    with pytest.raises(sio.StateDictIOError, match="parts"):
        sio.open_checkpoint(tmp_path / "model.pt", backend=backend)


def test_a_cycle_of_containers(backend, tmp_path):
    cycle = {"w": torch.ones(1)}
    cycle["self"] = cycle
    torch.save(cycle, tmp_path / "model.pt")
    with sio.open_checkpoint(tmp_path / "model.pt", backend=backend) as checkpoint:
        assert list(checkpoint) == ["w"]
