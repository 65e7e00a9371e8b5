"""Finds and loads the compiled modules: ``_core``, and the ``_torch_<major>_<minor>`` of the running torch.

docs/native-modules.md says what each is for. Where one is not there, or cannot be used, this says why, and what to do.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from ..installed.proofs import is_shortage
from . import installation

_PACKAGE = __name__.partition(".")[0]
_CORE = "_core"
_SUFFIXES = (".so", ".pyd")
_OF_TORCH = re.compile(r"_torch_(\d+)_(\d+)\.")


@dataclass(frozen=True)
class ModuleInfo:
    """Whether a compiled module is in use."""

    present: bool  #: it is there, and in use
    reason: str  #: in words; where it is not in use, why, with the cure

    def __bool__(self) -> bool:
        return self.present

    def __str__(self) -> str:
        return self.reason


class Extension(NamedTuple):
    """What there is of compiled code."""

    core: ModuleType | None  #: where it is in use
    core_info: ModuleInfo
    torch_info: ModuleInfo
    built_for_torch: str | None  #: the release of torch that the ``_torch`` module in use was built for
    is_installed: bool  #: whether a file of ``_core`` is there, so that the native backend is what was installed


_found: Extension | None = None


def find() -> Extension:
    """Loads what there is. Never raises. Done once, and again where something failed for want of memory or file
    descriptors."""
    global _found
    if _found is not None:
        return _found
    lacking, found = look()
    if not lacking:
        _found = found
    return found


def known() -> Extension | None:
    """What :func:`find` has found so far; loads nothing."""
    return _found


def look() -> tuple[bool, Extension]:
    """(whether something failed for want of memory or file descriptors, what there is)."""
    try:
        names = [name for name in _names_of_files() if name.endswith(_SUFFIXES)]
    except OSError as e:
        info = ModuleInfo(False, f"the package's directory cannot be read: {e}")
        return is_shortage(e), Extension(None, info, _without_core(), None, False)
    lacking, core, core_info, is_installed = _look_for_core(names)
    if core is None:
        return lacking, Extension(None, core_info, _without_core(), None, is_installed)
    lacking, torch_info, built_for = _look_for_torch(names, core)
    return lacking, Extension(core, core_info, torch_info, built_for, True)


def _names_of_files() -> list[str]:
    """Of the package's directories."""
    return sorted(name for directory in sys.modules[_PACKAGE].__path__ for name in os.listdir(directory))


def _look_for_core(names: list[str]) -> tuple[bool, ModuleType | None, ModuleInfo, bool]:
    """(whether something was lacking, the module, about it, whether a file of it is there)."""
    files = [name for name in names if name.startswith(f"{_CORE}.")]
    if is_free_threaded():
        reason = (
            f"{_CORE} is not loaded on a free-threaded build of Python: it relies on the global interpreter lock; "
            "the ordinary build of the same version has it"
        )
        return False, None, ModuleInfo(False, reason), bool(files)
    if not files:
        reason = f"this installation has no compiled {_CORE}; {installation.cure_by_building()}"
        return False, None, ModuleInfo(False, reason), False
    try:
        core = importlib.import_module(f"{_PACKAGE}.{_CORE}")
        core.use_torch_access(importlib.import_module(f"{__package__}.torch_access"))
        core.simd()  # a file of something else loads, too
    except Exception as e:  # a damaged file can raise nearly anything
        if is_shortage(e):
            return True, None, ModuleInfo(False, f"{_CORE} cannot be loaded: {e}"), True
        others = "" if _is_for_this_python(files) else f" (what is there is for other Pythons: {', '.join(files)})"
        return False, None, ModuleInfo(False, f"{_CORE} cannot be loaded: {e}{others}; {installation.cure()}"), True
    return False, core, ModuleInfo(True, f"{_CORE} is in use"), True


def is_free_threaded() -> bool:
    """Whether this is a build of Python without a global interpreter lock, whether or not that is switched off."""
    if not hasattr(sys, "_is_gil_enabled"):
        return False  # before 3.13
    import sysconfig

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED")) or not sys._is_gil_enabled()


def _is_for_this_python(files: list[str]) -> bool:
    from importlib.machinery import EXTENSION_SUFFIXES

    return any(f"{_CORE}{suffix}" in files for suffix in EXTENSION_SUFFIXES)


def _look_for_torch(names: list[str], core: ModuleType) -> tuple[bool, ModuleInfo, str | None]:
    """(whether something was lacking, about the module, what it was built for)."""
    release = _release(torch.__version__)
    found = [tuple(map(int, match.groups())) for name in names if (match := _OF_TORCH.match(name))]
    if release is None or release not in found:
        there = ", ".join(f"{major}.{minor}" for major, minor in sorted({*found})) or "none"
        reason = (
            f"no _torch module is installed for torch {torch.__version__} (installed for: {there}), so devices are "
            f"served through torch's Python API, which is slower; {installation.cure(newer=True)}; "
            f"{installation.cure_by_building()}"
        )
        return False, ModuleInfo(False, reason), None
    name = f"_torch_{release[0]}_{release[1]}"
    try:
        module = importlib.import_module(f"{_PACKAGE}.{name}")
        built_for = str(module.built_for)
        core.use_torch_functions(module.functions)
    except Exception as e:  # of the loader, or a table of another version
        if is_shortage(e):
            return True, ModuleInfo(False, f"{name} cannot be loaded: {e}"), None
        return False, ModuleInfo(False, f"{name} cannot be used: {e}; {installation.cure()}"), None
    return False, ModuleInfo(True, f"{name} is in use, built for torch {built_for}"), built_for


def _release(version: str) -> tuple[int, int] | None:
    """Major and minor: torch's C++ interface is stable within a minor release, and a build against the CPU libraries
    serves all devices."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def _without_core() -> ModuleInfo:
    return ModuleInfo(False, f"a _torch module serves {_CORE}, which is not in use")
