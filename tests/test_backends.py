"""Which backend is used, why, and what happens where the extension can't be."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import require_native
from corpus_case import filled
from oracle import assert_same_bytes, names_in, two_directories

import statedict_io as sio

PACKAGE = pathlib.Path(sio.__file__).parent
TORCH = torch.__version__

# An editable install's finder answers for a missing submodule wherever the package itself came from.
WITHOUT_EDITABLE_INSTALL = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""

# Prints what happens in a process that has the package at hand in some other state.
PROBE = """
import json, sys, torch, warnings, statedict_io as sio
info = sio.backend_info()
found = {k: getattr(info, k) for k in ("name", "reason", "built_for_torch", "torch", "simd")}
found["core"], found["torch_module"] = info.core.present, info.torch_module.present
found["package"] = sio.__file__
obj = {"weight": torch.arange(1.0, 9.0)}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for wish in ("python", "auto", "torch", "native", "auto"):
        try:
            sio.save(obj, f"{wish}.pt", backend=wish)
            found[wish] = "saved"
        except Exception as error:
            found[wish] = [type(error).__name__, str(error)]
found["warnings"] = [str(warning.message) for warning in caught if warning.category is sio.SlowerWarning]
torch.save(obj, "reference.pt")
print(json.dumps(found, default=str))
"""


def run(program, cwd, path=None):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(path or PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    program = WITHOUT_EDITABLE_INSTALL + program
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def copied(tmp_path):
    """A copy of the package that a test may damage, at ``copied/statedict_io``."""
    target = tmp_path / "copied" / "statedict_io"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def probe(copied, tmp_path):
    (tmp_path / "work").mkdir()
    found = run(PROBE, tmp_path / "work", copied.parent)
    assert pathlib.Path(found["package"]).parent == copied
    return found


def assert_falls_back(found, tmp_path, *causes, warns):
    """`auto` and `python` save with the Python backend; `native` names the cause and the cure, and so does the one
    warning of the process, where there is one."""
    assert found["name"] == "python"
    assert found["auto"] == found["python"] == found["torch"] == "saved"
    assert not found["core"] and not found["torch_module"]
    assert len(found["warnings"]) == warns
    assert all(found["reason"] in warning for warning in found["warnings"])
    kind, message = found["native"]
    assert kind == "NativeUnavailableError"
    for cause in causes:
        assert cause in message and cause in found["reason"]
    assert re.search("install|build", message), f"no cure in {message!r}"
    assert names_in(tmp_path / "work") == ["auto.pt", "python.pt", "reference.pt", "torch.pt"]
    sizes = {(tmp_path / "work" / name).stat().st_size for name in ("auto.pt", "reference.pt", "torch.pt")}
    assert max(sizes) - min(sizes) < 1024  # the names differ, and with them the padding


def extension_files(package):
    return [path for path in package.iterdir() if path.name.startswith("_core.") and path.suffix in (".so", ".pyd")]


def torch_module_files(package):
    return [path for path in package.iterdir() if path.name.startswith("_torch_") and path.suffix in (".so", ".pyd")]


def test_backend_info_tells_what_auto_uses():
    info = sio.backend_info()
    assert info.name in ("native", "python")
    assert info.torch == TORCH
    assert isinstance(info.reason, str) and info.reason
    assert info.core.reason and info.torch_module.reason
    assert info.core.present == bool(info.core) == (info.name == "native")
    assert list(info.proofs) == ["format", "reduction", "loading", "dcp structure"]
    assert info.proofs["format"].status == "holds"
    assert all(str(part) in str(info) for part in (info.name, info.core, info.torch_module, *info.proofs))
    if info.torch_module:
        assert info.built_for_torch.split("+")[0].split(".")[:2] == TORCH.split("+")[0].split(".")[:2]
    if info.core:
        assert isinstance(info.simd, str) and info.simd


def test_the_active_backend_can_be_asked_for_by_name(tmp_path):
    sio.save({"a": filled(3)}, tmp_path / "model.pt", backend=sio.backend_info().name)
    assert names_in(tmp_path) == ["model.pt"]


def test_auto_writes_torchs_bytes(tmp_path):
    ref, ours = two_directories(tmp_path)
    obj = {"a": filled(1000), "b": [1, "two"]}
    torch.save(obj, ref / "model.pt")
    sio.save(obj, ours / "model.pt")
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


@pytest.mark.parametrize("value", ["cuda", "", "NATIVE", None, 1, True, b"native"])
def test_an_unknown_backend_is_a_value_error_and_creates_nothing(value, tmp_path):
    with pytest.raises(ValueError, match="backend"):
        sio.save({"a": filled(3)}, tmp_path / "model.pt", backend=value)
    assert names_in(tmp_path) == []


def test_the_installed_extension_is_used(copied, tmp_path):
    require_native()
    found = probe(copied, tmp_path)
    assert (found["name"], found["auto"], found["native"], found["python"]) == ("native", "saved", "saved", "saved")
    assert found["core"] and found["warnings"] == []
    assert_same_bytes(*(resaved(tmp_path, name) for name in ("native", "torch")))


def resaved(tmp_path, name):
    """The probe's file under one common name, so that the archive names agree."""
    directory = tmp_path / name
    directory.mkdir()
    torch.save(torch.load(tmp_path / "work" / f"{name}.pt"), directory / "model.pt")
    return directory / "model.pt"


def test_without_compiled_modules(copied, tmp_path):
    for path in [*extension_files(copied), *torch_module_files(copied)]:
        path.unlink()
    found = probe(copied, tmp_path)
    assert found["built_for_torch"] is None and found["simd"] is None
    assert_falls_back(found, tmp_path, "no compiled _core", warns=0)


def test_with_an_extension_that_cannot_be_loaded(copied, tmp_path):
    require_native()
    for path in extension_files(copied):
        path.write_bytes(b"not a shared library" * 100)
    assert_falls_back(probe(copied, tmp_path), tmp_path, "cannot be loaded", warns=1)


def test_without_a_module_for_this_torch(copied, tmp_path):
    require_native()
    for path in torch_module_files(copied):
        path.rename(path.with_name(path.name.replace("_torch_", "_torch_9")))
    found = probe(copied, tmp_path)
    assert found["built_for_torch"] is None and found["simd"] is not None
    assert (found["name"], found["auto"], found["native"], found["torch"]) == ("native", "saved", "saved", "saved")
    assert_same_bytes(*(resaved(tmp_path, name) for name in ("native", "torch")))


def test_the_core_needs_no_torch(tmp_path):
    require_native()
    (core,) = extension_files(PACKAGE)
    program = f"""
import importlib.machinery, importlib.util, json, sys, zlib
loader = importlib.machinery.ExtensionFileLoader("_core", {str(core)!r})
core = importlib.util.module_from_spec(importlib.util.spec_from_loader("_core", loader))
loader.exec_module(core)
assert core.crc32(b"abc") == zlib.crc32(b"abc")
assert "torch" not in sys.modules and importlib.util.find_spec("torch") is None
try:
    core.PlannedArchive("archive", [], [], [], alignment=64, compute_crc32=True)
    core.OpenArchive(0)
except ValueError:
    print(json.dumps("done"))
"""
    done = subprocess.run([sys.executable, "-S", "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if nm := shutil.which("nm"):
        symbols = subprocess.run([nm, "-D", core], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\S*(?:3c10\d|[NKRPZ]2at\d|torch|THP)\S*", symbols) == []


SETTINGS = """
import json, torch, statedict_io as sio
from torch.utils.serialization import config
def save(name, **options):
    obj = {"w": torch.arange(1.0, 9.0), "pad": torch.arange(100)}
    sio.save(obj, f"ours/{name}.pt", **options)
    torch.save(obj, f"ref/{name}.pt")
FIRST
save("first", backend="torch")
config.save.storage_alignment = 4096
torch.serialization.set_crc32_options(False)
save("second")
config.save.storage_alignment = 64
torch.serialization.set_crc32_options(True)
save("third")
print(json.dumps([sio.backend_info().name, sio.backend_info().reason]))
"""

FIRST_SETTINGS = {
    "default": "",
    "alignment and no crc": "config.save.storage_alignment = 128; torch.serialization.set_crc32_options(False)",
    "modes": (
        "torch.serialization.skip_data().__enter__(); torch.inference_mode().__enter__(); "
        "torch.set_default_device('meta'); from torch._subclasses.fake_tensor import FakeTensorMode; "
        "FakeTensorMode(allow_non_fake_inputs=True).__enter__()"
    ),
}


@pytest.mark.parametrize("first", FIRST_SETTINGS)
def test_the_choice_of_a_backend_does_not_depend_on_the_settings_of_the_first_save(first, tmp_path):
    """Each backend proves itself once a process; the settings may change between, before and after."""
    two_directories(tmp_path)
    program = SETTINGS.replace("FIRST", FIRST_SETTINGS[first])
    if first == "modes":  # they would make the tensors, too
        program = program.replace('obj = {"w": torch.arange(1.0, 9.0), "pad": torch.arange(100)}', "obj = [1, 'text']")
    name, reason = run(program, tmp_path)
    assert name == sio.backend_info().name, reason
    for path in (tmp_path / "ref").iterdir():
        assert_same_bytes(path, tmp_path / "ours" / path.name)


def test_importing_starts_nothing_and_saves_nothing(tmp_path):
    program = (
        "import json, os, threading, torch\n"
        "before = threading.active_count(), len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))\n"
        "import statedict_io\n"
        "after = threading.active_count(), len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))\n"
        "print(json.dumps([before, after, os.listdir('.')]))"
    )
    before, after, files = run(program, tmp_path)
    assert before == after
    assert files == []


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
    assert importlib.util.find_spec("statedict_io").submodule_search_locations
