"""Builds statedict_io: pure Python, plus the native extension where torch and a C++ compiler are found.

CMakeLists.txt describes the native build; this file finds torch, runs CMake, and decides what kind of wheel results.
torch is never a build requirement: pip would download one, perhaps of another version than the one that will load the
extension. It is looked for in the environment that is being installed into instead, and never imported.

Environment variables:
  STATEDICT_IO_BUILD      auto (default): native where possible, else pure with a notice.
                          native: fail where the extension cannot be built. pure: never build it.
  STATEDICT_IO_TORCH_DIR  the torch package directory to build for, where it cannot be found by itself.
  STATEDICT_IO_WERROR     1: compiler warnings are errors.
  STATEDICT_IO_LABEL      1: the version says which torch the extension is for, as in 0.1.0+torch2.13. For wheels that
                          are built for several: their files need names that differ.
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
from setuptools.command.egg_info import egg_info
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "statedict_io"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OLDEST_TORCH = (2, 6)
FAILURE_TAIL_LINES = 40


class CannotBuildNative(Exception):
    """Why this machine or environment gets no extension."""


class Torch(NamedTuple):
    directory: Path
    version: str


def torch_directories() -> Iterator[Path]:
    """Where torch may be installed, the likeliest place first."""
    if explicit := os.environ.get("STATEDICT_IO_TORCH_DIR"):
        yield Path(explicit)
        return
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


def find_torch() -> Torch:
    searched = list(dict.fromkeys(torch_directories()))
    for directory in searched:
        if (directory / "version.py").is_file():
            break
    else:
        raise CannotBuildNative("no torch was found at " + ", ".join(map(str, searched)))
    match = re.search(
        r"""^__version__\b[^=\n]*=\s*["']([^"']+)["']""", (directory / "version.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise CannotBuildNative(f"{directory}/version.py names no version")
    version = match.group(1)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise CannotBuildNative(f"torch {version} at {directory} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    if not (directory / f"_C{EXT_SUFFIX}").is_file():
        raise CannotBuildNative(f"torch {version} at {directory} is not for this Python (no _C{EXT_SUFFIX})")
    if not (directory / "include" / "torch" / "csrc").is_dir():
        raise CannotBuildNative(f"torch {version} at {directory} came without its C++ headers")
    return Torch(directory, version)


def check_platform() -> None:
    if sys.platform == "win32":
        raise CannotBuildNative("the extension has not been ported to Windows")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise CannotBuildNative("no C++ compiler was found (set CXX, or install g++ or clang++)")


def print_notice(cause: str) -> None:
    rule = "=" * 100
    print(
        f"""
{rule}
statedict_io is being installed WITHOUT its native extension.

Cause: {cause}

It will work through its fallback (same bytes, same guarantees, slower) wherever torch can be imported;
statedict_io.backend_info() says which backend is active. For the fast one, install torch and a C++ compiler, then
    STATEDICT_IO_BUILD=native pip install --force-reinstall --no-deps --no-cache-dir <what you installed>
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


class BuildExtWithCMake(build_ext):
    """Builds statedict_io._native, and the _build_info.py that belongs to it, by running CMake."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except CompileError as error:
            if not ext.optional:
                raise
            print_notice(f"the extension could not be built: {error}")
            # setuptools goes on without an optional extension; BdistWheelOfWhatWasBuilt then makes the wheel pure.
            raise CompileError("see the notice above") from None

    def _build(self, ext: Extension) -> None:
        torch = find_torch()
        cmake, ninja = find_program("cmake"), find_program("ninja")
        if cmake is None:
            raise CompileError("cmake was not found; `pip install cmake ninja`, or build with isolation")
        # Not build_temp: an editable install would start from nothing each time. One directory per torch, because the
        # headers of another one need not be newer than the objects.
        build_directory = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}-torch-{torch.version}"
        configure: list[str | Path] = [cmake, "-S", ROOT, "-B", build_directory]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_DIR={torch.directory}",
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
        run_and_keep_tail([cmake, "--build", build_directory, "--target", "_native"])
        run_and_keep_tail([cmake, "--install", build_directory, "--strip", "--prefix", self.build_lib])

    def _build_info(self) -> Path:
        return Path(self.build_lib) / PACKAGE / "_build_info.py"

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self._build_info())]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if self._build_info().is_file():
            shutil.copy2(self._build_info(), ROOT / PACKAGE)


class BuildPyFresh(build_py):
    """Collects the Python files; nothing an earlier build left behind gets into this one."""

    def run(self) -> None:
        if why_pure:
            if build_mode == "native":
                raise SetupError(f"STATEDICT_IO_BUILD=native, but {why_pure}")
            print_notice(why_pure)
        if self.editable_mode:
            # An extension from an earlier build must not pass for the result of this one, which may have none.
            for stale in (f"_native{EXT_SUFFIX}", "_build_info.py"):
                (ROOT / PACKAGE / stale).unlink(missing_ok=True)
        else:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        # _build_info.py next to the sources belongs to an extension built in place, not to this wheel.
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "_build_info"]


class BdistWheelOfWhatWasBuilt(bdist_wheel):
    """Tags the wheel by whether the extension was built, not by whether it was going to be."""

    def run(self) -> None:
        self.run_command("build")
        if self.distribution.has_ext_modules():
            build = self.get_finalized_command("build_ext")
            if not all(Path(build.get_ext_fullpath(ext.name)).is_file() for ext in self.distribution.ext_modules):
                self.distribution.ext_modules = []
                self.root_is_pure = True
        super().run()


class EggInfoWithLabel(egg_info):
    """Adds what STATEDICT_IO_LABEL asks for to the version."""

    def finalize_options(self) -> None:
        if os.environ.get("STATEDICT_IO_LABEL") == "1" and not why_pure:
            release = ".".join(re.findall(r"\d+", find_torch().version)[:2])
            self.tag_build = f"+torch{release}"
        super().finalize_options()


build_mode = os.environ.get("STATEDICT_IO_BUILD", "auto")
if build_mode not in ("auto", "native", "pure"):
    raise SystemExit(f"STATEDICT_IO_BUILD must be auto, native or pure, not {build_mode!r}")

why_pure = "STATEDICT_IO_BUILD=pure asks for it." if build_mode == "pure" else None
if why_pure is None:
    try:
        find_torch()
        check_platform()
    except CannotBuildNative as reason:
        why_pure = str(reason)


setup(
    # CMakeLists.txt lists the sources. Optional: without it the package still works.
    ext_modules=[] if why_pure else [Extension(f"{PACKAGE}._native", sources=[], optional=build_mode == "auto")],
    cmdclass={
        "bdist_wheel": BdistWheelOfWhatWasBuilt,
        "build_ext": BuildExtWithCMake,
        "build_py": BuildPyFresh,
        "egg_info": EggInfoWithLabel,
    },
)
