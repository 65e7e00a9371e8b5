"""Which compiled modules are found, and what is said where one is absent."""

import errno
import importlib.metadata
import os
import sys
import types

import pytest
import torch

import statedict_io as sio
from statedict_io.backends import extension, installation

RELEASE = torch.__version__.split("+")[0].split(".")[:2]
OF_THIS_TORCH = f"_torch_{RELEASE[0]}_{RELEASE[1]}"
SUFFIX = ".cpython-311-x86_64-linux-gnu.so"


ACCESS = object()  #: stands for what _core asks of torch's Python API


class Core:
    """As far as it is asked when it is loaded."""

    used = access = None

    def use_torch_access(self, access):
        self.access = access

    def simd(self):
        return "some"

    def use_torch_functions(self, capsule):
        if capsule != "functions":
            raise ImportError(f"its table of functions has version 2, {capsule!r} is of version 1")
        self.used = capsule


def torch_module(functions="functions"):
    return types.SimpleNamespace(functions=functions, built_for="9.9.0+cpu")


@pytest.fixture
def installed(monkeypatch):
    """installed({module name: module or what importing it raises}, files=names): what is there, for one test."""

    def install(modules, files=None):
        names = [f"{name}{SUFFIX}" for name in modules] if files is None else files
        monkeypatch.setattr(extension, "_found", None)
        monkeypatch.setattr(extension, "_names_of_files", lambda: ["__init__.py", *names])

        def import_module(name):
            if name.endswith(".backends.torch_access"):
                return ACCESS
            module = modules.get(name.rpartition(".")[2], ModuleNotFoundError(f"No module named {name!r}"))
            if isinstance(module, BaseException):
                raise module
            return module

        monkeypatch.setattr(extension.importlib, "import_module", import_module)
        return extension.find()

    return install


@pytest.fixture(params=["from source", "from a wheel"])
def cured_by(request, monkeypatch):
    """What a cure has to say."""
    pip = None if request.param == "from source" else "pip"
    monkeypatch.setattr(installation, "_pip_where_a_wheel_was_installed", lambda: pip)
    return "in the source tree" if pip is None else "pip install --upgrade"


def test_both_modules_are_found_and_brought_together(installed):
    core = Core()
    found = installed({"_core": core, OF_THIS_TORCH: torch_module(), "_torch_1_0": torch_module()})
    assert found.core is core and core.access is ACCESS and core.used == "functions"
    assert found.core_info and found.torch_info
    assert found.built_for_torch == "9.9.0+cpu"
    assert extension.find() is found


def test_there_is_no_core(installed):
    found = installed({OF_THIS_TORCH: torch_module()})
    assert found.core is None and not found.is_installed
    assert "no compiled _core" in found.core_info.reason and "STATEDICT_IO_BUILD=native" in found.core_info.reason
    assert not found.torch_info and "_core" in found.torch_info.reason


@pytest.mark.parametrize("problem", [ImportError("wrong ELF class"), SystemError("damaged"), AttributeError("simd")])
def test_core_cannot_be_loaded(problem, installed, cured_by):
    found = installed({"_core": problem, OF_THIS_TORCH: torch_module()})
    assert found.core is None and found.is_installed
    assert str(problem) in found.core_info.reason and cured_by in found.core_info.reason
    assert extension.find() is found  # once


def test_a_module_of_that_name_that_is_something_else(installed):
    found = installed({"_core": types.SimpleNamespace()})
    assert found.core is None and found.is_installed and "no attribute" in found.core_info.reason


def test_a_torch_that_lacks_what_core_asks_of_it(installed):
    core = Core()

    def refuse(access):
        raise AttributeError("module 'torch._C' has no attribute '_dispatch_keys'")

    core.use_torch_access = refuse
    found = installed({"_core": core})
    assert found.core is None and found.is_installed and "_dispatch_keys" in found.core_info.reason


def test_core_is_there_for_other_pythons(installed, cured_by):
    files = ["_core.cpython-27-x86_64-linux-gnu.so", "_core.cp27-win_amd64.pyd"]
    found = installed({}, files=files)
    assert found.core is None and found.is_installed
    assert all(name in found.core_info.reason for name in files) and cured_by in found.core_info.reason


def test_there_is_no_torch_module(installed, cured_by):
    found = installed({"_core": Core()})
    assert found.core is not None and found.built_for_torch is None
    assert not found.torch_info
    assert torch.__version__ in found.torch_info.reason and "none" in found.torch_info.reason
    assert (cured_by if "pip" in cured_by else "source tree") in found.torch_info.reason


def test_there_are_torch_modules_for_other_releases(installed):
    others = {"_torch_2_100": torch_module(), "_torch_1_0": torch_module()}
    found = installed({"_core": Core(), **others})
    assert not found.torch_info and "(installed for: 1.0, 2.100)" in found.torch_info.reason


@pytest.mark.parametrize(
    "problem",
    [
        ImportError("undefined symbol: _ZN3c10"),
        torch_module("older"),
        types.SimpleNamespace(),
        types.SimpleNamespace(functions="functions"),
    ],
)
def test_the_torch_module_cannot_be_used(problem, installed, cured_by):
    found = installed({"_core": Core(), OF_THIS_TORCH: problem})
    assert found.core is not None and found.built_for_torch is None
    assert not found.torch_info and OF_THIS_TORCH in found.torch_info.reason and cured_by in found.torch_info.reason
    if problem is not None and getattr(problem, "functions", None) == "older":
        assert "version 1" in found.torch_info.reason


@pytest.mark.parametrize("lacking", ["_core", OF_THIS_TORCH])
@pytest.mark.parametrize(
    "shortage", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), ImportError("failed to map segment")]
)
def test_what_failed_for_want_of_something_is_tried_again(lacking, shortage, installed):
    modules = {"_core": Core(), OF_THIS_TORCH: torch_module()}
    installed({**modules, lacking: shortage})
    assert extension.known() is None
    assert not (extension.find().core_info and extension.find().torch_info)
    assert "install" not in extension.find().core_info.reason  # that would not help
    found = installed(modules)
    assert found.core_info and found.torch_info


def test_a_directory_that_cannot_be_read_is_tried_again(monkeypatch):
    def none(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(extension, "_found", None)
    monkeypatch.setattr(extension.os, "listdir", none)
    assert sio.backend_info().name == "python"
    monkeypatch.undo()
    assert extension.find().core_info.present == (sio.backend_info().name == "native")


@pytest.mark.parametrize("gil", [True, False])
def test_a_free_threaded_python_refuses_core(gil, installed, monkeypatch, tmp_path):
    """Also where the lock is switched on: the build has another ABI."""
    import sysconfig

    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"))
    found = installed({})
    assert "free-threaded" in found.core_info.reason and not found.is_installed  # building one would not help
    found = installed({"_core": AssertionError("it is not to be imported"), OF_THIS_TORCH: torch_module()})
    assert found.core is None and not found.torch_info and found.is_installed
    assert "free-threaded" in found.core_info.reason
    info = sio.backend_info()
    assert info.name == "python" and "free-threaded" in info.reason
    sio.save({"w": torch.ones(3)}, tmp_path / "model.pt", backend="python")
    assert torch.load(tmp_path / "model.pt")["w"].sum() == 3
    with pytest.raises(sio.NativeUnavailableError, match="free-threaded"):
        sio.save({}, tmp_path / "model.pt", backend="native")


def test_a_python_with_the_lock_loads_core(installed, monkeypatch):
    import sysconfig

    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 0)
    assert installed({"_core": Core()}).core_info


class Distribution:
    """One that importlib.metadata could have found."""

    def __init__(self, **files):
        self.files = files

    def read_text(self, name):
        return self.files.get(name.replace(".json", ""))

    def locate_file(self, name):
        return os.path.join(os.path.dirname(os.path.dirname(sio.__file__)), self.files.get("at", name))


MANYLINUX = "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_28_x86_64\n"
LOCAL = "Wheel-Version: 1.0\nTag: cp311-cp311-linux_x86_64\n"


@pytest.mark.parametrize(
    ("files", "pip"),
    [
        ({"WHEEL": MANYLINUX, "INSTALLER": "pip\n"}, "pip"),
        ({"WHEEL": MANYLINUX, "INSTALLER": "uv"}, "uv pip"),
        ({"WHEEL": MANYLINUX}, "pip"),
        ({"WHEEL": "Tag: py3-none-any\n", "INSTALLER": "pip"}, "pip"),
        ({"WHEEL": LOCAL, "direct_url": '{"archive_info": {}, "url": "file:///statedict_io-1-any.whl"}'}, "pip"),
        ({"WHEEL": LOCAL, "INSTALLER": "pip"}, None),  # built from an index's source archive
        ({"WHEEL": LOCAL, "direct_url": '{"dir_info": {"editable": true}, "url": "file:///src"}'}, None),
        ({"WHEEL": MANYLINUX, "direct_url": '{"vcs_info": {}, "url": "https://example.org/it.git"}'}, None),
        ({"WHEEL": MANYLINUX, "direct_url": "not json"}, None),
        ({"WHEEL": MANYLINUX, "at": "elsewhere"}, None),  # another copy
    ],
)
def test_a_cure_suits_how_the_package_was_installed(files, pip, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(**files))
    cures = [installation.cure(), installation.cure(newer=True), installation.cure_by_building()]
    if pip is None:
        assert all("STATEDICT_IO_BUILD=native pip install" in cure and "source tree" in cure for cure in cures)
    else:
        assert f"{pip} install --upgrade --force-reinstall" in cures[0]
        assert cures[1].endswith(f": {pip} install --upgrade statedict-io")
        assert f"STATEDICT_IO_BUILD=native {pip} install" in cures[2] and "--no-binary statedict-io" in cures[2]


def test_without_a_distribution_it_is_a_source_tree(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    assert "source tree" in installation.cure()
