"""What importing statedict_io, saving and loading import; nothing here looks at a clock."""

import ast
import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

import statedict_io as sio

ROOT = pathlib.Path(sio.__file__).parent


def modules_named(names):
    """Each with the packages that it lies in."""
    parts = [name.split(".") for name in names.split()]
    return {".".join(["statedict_io", *of[:end]]) for of in parts for end in range(1, len(of) + 1)}


# What saves into a file: a signal handler may be the first who does.
IMPORTED = {"statedict_io"} | modules_named("""
    backends.extension backends.installation backends.native backends.protocol backends.reproduction backends.slower
    errors installed.proofs installed.stock installed.torch_format options pickles.pickling progress remote.urls
    system.descriptors system.device_room system.directories system.file_digest system.full_writes system.host_memory
    system.locks system.pacing system.processes version writing.async_saving writing.in_flight writing.in_place
    writing.leftovers writing.pending writing.places writing.replacement writing.saving writing.sidecar
    writing.stock_saves writing.suffixes writing.targets writing.temporary_names
""")
# Of torch only what every save asks for its settings.
OF_TORCH = {"torch.utils.serialization", "torch.utils.serialization.config"}
FOR_CORE = modules_named("backends.torch_access") | {"statedict_io._core.testing"}
FOR_LOADING = modules_named("""
    archive.crc32 archive.directory archive.inflate archive.record_entry backends.native_reading
    backends.python_reading backends.record_rows backends.tasks formats.kinds pickles.allowed_globals
    pickles.hash_bounds pickles.lean_pickle pickles.persistent_ids pickles.set_aside pickles.sparse_validation
    pickles.tensor_call_pattern pickles.traced_pickle pickles.unpickling reading.load_errors reading.load_steps
    reading.loading reading.map_location reading.object_source reading.opened_again reading.readahead
    reading.opened_bytes reading.payloads reading.records reading.trial reading.weight_folders reading.weights
    untrusted.escaping untrusted.limits
""")
OF_PYTHON_BACKEND = modules_named("""
    archive.crc32 archive.directory archive.inflate archive.layout archive.names_hash archive.record_entry
    archive.serialization_id backends.arenas backends.payloads backends.python
    backends.python_reading backends.record_rows backends.strips backends.tasks pickles.lean_pickle
""")


def imported_by(*programs, cwd, before="import torch"):
    """The modules that each program adds, in one process, after ``before``."""
    lines = ["import json, sys", before, "seen, added = set(sys.modules), []"]
    for program in programs:
        lines += [program, "added.append(sorted(set(sys.modules) - seen)); seen |= set(sys.modules)"]
    lines.append("print(json.dumps(added))")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def of_python(names):
    """Those of this package, without compiled modules: which are there depends on the installation."""
    return {name for name in names if not is_compiled(name) and name.partition(".")[0] == "statedict_io"}


def is_compiled(name):
    return any(ROOT.glob(f"{name.rpartition('.')[2]}.*.so"))


def test_importing_adds_what_saves_and_nothing_else(tmp_path):
    (added,) = imported_by("import statedict_io", cwd=tmp_path)
    assert added - OF_TORCH == IMPORTED


# A signal's handler saves, as the first in its process, while the main thread looks for another module.
INTERRUPTED = """
import faulthandler, signal, sys, torch
import statedict_io as sio
faulthandler.dump_traceback_later(100, exit=True)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "interrupted":
            signal.raise_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *_: sio.save({"w": torch.ones(3)}, "model.pt", backend=sys.argv[1]))
sys.meta_path.insert(0, Finder())
try:
    import interrupted
except ModuleNotFoundError:
    pass
assert torch.equal(torch.load("model.pt")["w"], torch.ones(3))
"""


def test_a_handler_that_interrupts_an_import_can_save(backend, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, backend],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_save_and_a_load_import_what_they_use(tmp_path):
    save = "import statedict_io as sio; sio.save({'w': torch.ones(3), 'step': 1}, 'model.pt')"
    again = "sio.save({'w': torch.ones(4)}, 'model.pt', durable=False)"
    load = "sio.load('model.pt')"
    (saving, saving_again, loading) = imported_by(save, again, load, cwd=tmp_path)
    expected = IMPORTED | (FOR_CORE if sio.backend_info().name == "native" else OF_PYTHON_BACKEND)
    assert of_python(saving) == expected
    assert of_python(saving_again) == set()
    assert of_python(loading) == FOR_LOADING - saving - ({"statedict_io.backends.native_reading"} - loading)


def test_the_background_and_the_python_backend_import_nothing_but_their_own(tmp_path):
    (in_background, in_python) = imported_by(
        "sio.save_async({'w': torch.ones(3)}, 'model.pt').result()",
        "sio.save({'w': torch.ones(3)}, 'model.pt', backend='python')",
        cwd=tmp_path,
        before="import torch, statedict_io as sio; sio.save({}, 'first.pt')",
    )
    assert of_python(in_background) == set()
    assert of_python(in_python) <= OF_PYTHON_BACKEND


def test_asking_for_the_backend_imports_no_dcp(tmp_path):
    (asked,) = imported_by("import statedict_io as sio; assert sio.backend_info().proofs", cwd=tmp_path)
    assert not {name for name in asked if name.startswith("statedict_io.dcp")}


# Runs a program for each line of names, in a child that has imported nothing of ours but the package.
EACH = """
import os, sys, torch, statedict_io
for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        exec(sys.argv[1].format(name))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
"""


def each_in_a_process(program, names, cwd):
    done = subprocess.run(
        [sys.executable, "-c", EACH, program, *names],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_all_public_names_are_there_whichever_is_asked_for_first(tmp_path):
    assert {*sio.__all__} <= {*dir(sio)}
    program = "from statedict_io import {0}; import statedict_io; assert statedict_io.{0} is {0}"
    each_in_a_process(program, sio.__all__, tmp_path)
    imported_by("from statedict_io import *; load, save, verify", cwd=tmp_path)


def test_what_is_imported_later_is_typed_and_public():
    """What a type checker reads is the table that __getattr__ goes by."""
    (checked,) = (
        node
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    typed = {alias.name: node.module for node in checked.body for alias in node.names}
    assert typed == sio._LATER
    assert {*sio._LATER} < {*sio.__all__}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"statedict_io.*no_such_name"):
        sio.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        exec("from statedict_io import no_such_name")


def test_public_names_are_pickled_by_where_they_live(tmp_path):
    """In processes that have not asked for them yet."""
    for name in sio.__all__:
        (tmp_path / name).write_bytes(pickle.dumps(getattr(sio, name)))
    program = "import pickle; found = pickle.load(open('{0}', 'rb')); assert found is statedict_io.{0}"
    each_in_a_process(program, sio.__all__, tmp_path)
