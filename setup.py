"""Builds statedict_io: Python, plus the compiled modules that docs/native-modules.md describes.

CMakeLists.txt describes the native build; this file finds a compiler and torch, runs CMake, and decides what kind of
wheel results. _core needs a C++ compiler alone. _torch_<release> is built as well where headers of a torch are found.
torch is never a build requirement: pip would download one, perhaps of another version than the one that will load the
module. It is looked for in the environment that is being installed into instead, and never imported.

Environment variables:
  STATEDICT_IO_BUILD      auto (default): native where possible, else pure with a notice.
                          native: fail where _core, or _torch for a torch that is there, cannot be built.
                          pure: build neither.
  STATEDICT_IO_TORCH_DIR  the torch package directories to build a _torch module for, separated as in PATH, where none
                          can be found by itself, or for several releases. Empty: for none.
  STATEDICT_IO_WERROR     1: compiler warnings are errors.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "statedict_io"
CORE = "_core"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OLDEST_TORCH = (2, 6)
FAILURE_TAIL_LINES = 40


class CannotBuildNative(Exception):
    """Why this machine or environment gets no compiled module, or none for its torch."""


class Torch(NamedTuple):
    directory: Path
    version: str

    @property
    def module(self) -> str:
        return "_torch_{}_{}".format(*re.findall(r"\d+", self.version)[:2])


def torch_directories() -> Iterator[Path]:
    """Where torch may be installed, the likeliest place first."""
    # Importable where the build is not isolated; find_spec does not run torch/__init__.py.
    spec = find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    # pip's isolated build hides the site directories from sys.path, but runs the target environment's interpreter,
    # whose install scheme still names them.
    bases: list[dict[str, str]] = [{}]
    in_venv = sys.prefix != sys.base_prefix
    if in_venv and _venv_sees_system_packages():
        bases.append({"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    for base in bases:
        for scheme_path in ("platlib", "purelib"):
            yield Path(sysconfig.get_path(scheme_path, vars=base)) / "torch"
    if not in_venv or _venv_sees_system_packages():
        yield Path(site.getusersitepackages()) / "torch"
        yield from (Path(directory) / "torch" for directory in site.getsitepackages([sys.base_prefix]))


def _venv_sees_system_packages() -> bool:
    config = Path(sys.prefix) / "pyvenv.cfg"
    return config.is_file() and bool(
        re.search(r"^include-system-site-packages\s*=\s*true", config.read_text(), re.MULTILINE | re.IGNORECASE)
    )


def find_torches() -> list[Torch]:
    """Those to build a _torch module for."""
    explicit = os.environ.get("STATEDICT_IO_TORCH_DIR")
    if explicit is not None:
        return [torch_in(Path(directory)) for directory in explicit.split(os.pathsep) if directory]
    searched = list(dict.fromkeys(torch_directories()))
    for directory in searched:
        if not (directory / "version.py").is_file():
            continue
        torch = torch_in(directory)
        if not (directory / f"_C{EXT_SUFFIX}").is_file():
            raise CannotBuildNative(f"torch {torch.version} at {directory} is not for this Python (no _C{EXT_SUFFIX})")
        return [torch]
    raise CannotBuildNative("no torch was found at " + ", ".join(map(str, searched)))


def torch_in(directory: Path) -> Torch:
    if not (directory / "version.py").is_file():
        raise CannotBuildNative(f"there is no torch at {directory}")
    match = re.search(
        r"""^__version__\b[^=\n]*=\s*["']([^"']+)["']""", (directory / "version.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise CannotBuildNative(f"{directory}/version.py names no version")
    version = match.group(1)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise CannotBuildNative(f"torch {version} at {directory} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    if not (directory / "include" / "torch" / "csrc").is_dir():
        raise CannotBuildNative(f"torch {version} at {directory} came without its C++ headers")
    return Torch(directory, version)


def check_platform() -> None:
    if sys.platform == "win32":
        raise CannotBuildNative("the compiled modules have not been ported to Windows")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise CannotBuildNative("no C++ compiler was found (set CXX, or install g++ or clang++)")


def print_notice(cause: str, module: str) -> None:
    rule = "=" * 100
    if module == CORE:
        consequence = """statedict_io is being installed WITHOUT its native extension.

It will work in pure Python (same bytes, same guarantees, slower) wherever torch can be imported;
statedict_io.backend_info() says which backend is active. For the fast one, install a C++ compiler, then"""
    else:
        consequence = f"""statedict_io is being installed WITHOUT {module}.

What it does in host memory is as fast; devices are served through torch's Python API. For the faster way, install
torch and a C++ compiler, then"""
    print(
        f"""
{rule}
{consequence}
    STATEDICT_IO_BUILD=native pip install --force-reinstall --no-deps --no-cache-dir <what you installed>

Cause: {cause}
{rule}
""",
        file=sys.stderr,
        flush=True,
    )


def run_and_keep_tail(command: list[str | Path]) -> None:
    """Runs a build step, echoing its output; its last lines become the message of the error."""
    print("+", *command, flush=True)
    tail: deque[str] = deque(maxlen=FAILURE_TAIL_LINES)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if process.returncode != 0:
        raise CompileError(f"{command[0]} exited with status {process.returncode}:\n{''.join(tail)}")


def find_program(name: str) -> str | None:
    # The scripts directory is not on PATH when pip is called by its full path in an environment that is not activated.
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


class ModuleExtension(Extension):
    """A module that CMake builds; CMakeLists.txt lists the sources."""

    def __init__(self, module: str, torch: Torch | None, optional: bool) -> None:
        super().__init__(f"{PACKAGE}.{module}", sources=[], optional=optional)
        self.module = module
        self.torch = torch


class BuildExtWithCMake(build_ext):
    """Builds each module by running CMake."""

    def build_extension(self, ext: ModuleExtension) -> None:
        try:
            self._build(ext)
        except CompileError as error:
            if not ext.optional:
                raise
            print_notice(f"it could not be built: {error}", ext.module)
            # setuptools goes on without an optional extension; BdistWheelOfWhatWasBuilt then makes the wheel pure.
            raise CompileError("see the notice above") from None

    def _build(self, ext: ModuleExtension) -> None:
        cmake, ninja = find_program("cmake"), find_program("ninja")
        if cmake is None:
            raise CompileError("cmake was not found; `pip install cmake ninja`, or build with isolation")
        # Not build_temp: an editable install would start from nothing each time. One directory per torch, because the
        # headers of another one need not be newer than the objects.
        name = f"native-{sysconfig.get_config_var('SOABI')}"
        build_directory = ROOT / "build" / (name if ext.torch is None else f"{name}-torch-{ext.torch.version}")
        configure: list[str | Path] = [cmake, "-S", ROOT, "-B", build_directory]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DSDIO_BUILD_EXTENSION=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_DIR={ext.torch.directory if ext.torch is not None else ''}",
            f"-Dpybind11_DIR={pybind11_directory()}",
            f"-DCMAKE_COMPILE_WARNING_AS_ERROR={'ON' if os.environ.get('STATEDICT_IO_WERROR') == '1' else 'OFF'}",
        ]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        is_reused = build_directory.exists()
        try:
            run_and_keep_tail(configure)
        except CompileError:
            # A cache that came along with a copied source tree, or from a compiler that is gone.
            if not is_reused:
                raise
            shutil.rmtree(build_directory)
            run_and_keep_tail(configure)
        run_and_keep_tail([cmake, "--build", build_directory, "--target", ext.module])
        run_and_keep_tail(
            [cmake, "--install", build_directory, "--strip", "--prefix", self.build_lib, "--component", ext.module]
        )


def pybind11_directory() -> str:
    try:
        import pybind11
    except ImportError:
        raise CompileError("pybind11 was not found; `pip install pybind11`, or build with isolation") from None
    return pybind11.get_cmake_dir()


class BuildPyFresh(build_py):
    """Collects the Python files; nothing an earlier build left behind gets into this one."""

    def run(self) -> None:
        if why_pure:
            if build_mode == "native":
                raise SetupError(f"STATEDICT_IO_BUILD=native, but {why_pure}")
            print_notice(why_pure, CORE)
        if why_without_torch and not why_pure:
            if build_mode == "native" and os.environ.get("STATEDICT_IO_TORCH_DIR"):
                raise SetupError(f"STATEDICT_IO_BUILD=native, but {why_without_torch}")
            print_notice(why_without_torch, "_torch")
        if self.editable_mode:
            # A module from an earlier build must not pass for the result of this one, which may have none.
            for pattern in (CORE, "_torch_*"):
                for stale in (ROOT / PACKAGE).glob(f"{pattern}{EXT_SUFFIX}"):
                    stale.unlink()
        else:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()


class BdistWheelOfWhatWasBuilt(bdist_wheel):
    """Tags the wheel by whether a module was built, not by whether one was going to be."""

    def run(self) -> None:
        self.run_command("build")
        if self.distribution.has_ext_modules():
            build = self.get_finalized_command("build_ext")
            if not any(Path(build.get_ext_fullpath(ext.name)).is_file() for ext in self.distribution.ext_modules):
                self.distribution.ext_modules = []
                self.root_is_pure = True
        super().run()


build_mode = os.environ.get("STATEDICT_IO_BUILD", "auto")
if build_mode not in ("auto", "native", "pure"):
    raise SystemExit(f"STATEDICT_IO_BUILD must be auto, native or pure, not {build_mode!r}")

why_pure = "STATEDICT_IO_BUILD=pure asks for it." if build_mode == "pure" else None
why_without_torch = None
modules: list[ModuleExtension] = []
if why_pure is None:
    try:
        check_platform()
    except CannotBuildNative as reason:
        why_pure = str(reason)
    else:
        # Optional: without them the package still works.
        modules.append(ModuleExtension(CORE, None, optional=build_mode == "auto"))
        try:
            torches = find_torches()
            modules += [ModuleExtension(torch.module, torch, optional=build_mode == "auto") for torch in torches]
        except CannotBuildNative as reason:
            why_without_torch = str(reason)


setup(
    ext_modules=modules,
    cmdclass={"bdist_wheel": BdistWheelOfWhatWasBuilt, "build_ext": BuildExtWithCMake, "build_py": BuildPyFresh},
)
