"""Builds the compiled modules of a wheel for another CPU, glibc and Python than are here, and puts the wheel together.

The Python part is a pure wheel, as setup.py makes it. A wheel for a CPU and a Python is that one with `_core` and a
`_torch_<release>` for each release of torch added, and with another tag.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import cross_compiler
import headers
import stub_libraries


class Target(NamedTuple):
    cpu: str  # "aarch64"
    python: str  # "3.11"

    @property
    def suffix(self) -> str:
        """Of the file of an extension module."""
        return f".cpython-{self.python.replace('.', '')}-{self.cpu}-linux-gnu.so"

    @property
    def tag(self) -> str:
        """Of the wheel."""
        interpreter = "cp" + self.python.replace(".", "")
        return f"{interpreter}-{interpreter}-manylinux_{cross_compiler.GLIBC.replace('.', '_')}_{self.cpu}"


class Builder:
    """Builds modules of one source tree, with all that it makes below `work`."""

    def __init__(self, sources: Path, header_folder: Path, work: Path, use_ccache: bool) -> None:
        self.sources = sources
        self.headers = header_folder
        self.work = work
        self._ccache = shutil.which("ccache") if use_ccache else None
        self._toolchains: dict[str, Path] = {}
        self._torches: dict[tuple[str, str], Path] = {}

    def core(self, target: Target) -> Path:
        return self._built(target, "_core", None)

    def torch_module(self, target: Target, release: str) -> Path:
        return self._built(target, f"_torch_{release.replace('.', '_')}", self._torch(target.cpu, release))

    def _built(self, target: Target, module: str, torch: Path | None) -> Path:
        """The file of a module, which is built unless it is up to date."""
        directory = self.work / f"{target.cpu}-{target.python}-{module.lstrip('_')}"
        configure: list[str | Path] = ["cmake", "-S", self.sources, "-B", directory]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_COMPILE_WARNING_AS_ERROR=OFF",
            f"-DCMAKE_TOOLCHAIN_FILE={self._toolchain(target.cpu)}",
            "-DSDIO_BUILD_EXTENSION=ON",
            f"-DTORCH_DIR={torch or ''}",
            f"-DPython_INCLUDE_DIR={headers.python_headers(self.headers, target.python)}",
            f"-DPython_SOABI={target.suffix.split('.')[1]}",
            f"-Dpybind11_DIR={_pybind11()}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        if self._ccache:
            configure += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={self._ccache}"]
        # CMake does not know that what it links may have changed: stubs, and what later_symbols.cpp holds.
        for linked in directory.glob(f"{module}.*so"):
            linked.unlink()
        environment = {name: value for name, value in os.environ.items() if name != "CCACHE_BASEDIR"}
        environment |= {"CCACHE_COMPILERTYPE": "clang", "CCACHE_SLOPPINESS": "time_macros"}
        for command in (configure, ["cmake", "--build", directory, "--target", module]):
            run(*command, environment=environment)
        (built,) = directory.glob(f"{module}.*so")
        return built

    def _toolchain(self, cpu: str) -> Path:
        if cpu not in self._toolchains:
            self._toolchains[cpu] = cross_compiler.prepare(cpu, self.work / cpu)
        return self._toolchains[cpu]

    def _torch(self, cpu: str, release: str) -> Path:
        """A torch package directory that is enough to build against: headers, and stubs of its libraries."""
        if (cpu, release) not in self._torches:
            kept = headers.torch_headers(self.headers, release)
            directory = self.work / cpu / f"torch-{release}"
            shutil.rmtree(directory, ignore_errors=True)
            (directory / "lib").mkdir(parents=True)
            (directory / "include").symlink_to(kept / "include")
            shutil.copy(kept / "version.py", directory)
            compiler = self._toolchain(cpu).with_name("c++")
            for name in headers.LIBRARIES:
                stub_libraries.build(directory / "lib" / name, headers.symbols_of(kept, name), compiler)
            self._torches[cpu, release] = directory
        return self._torches[cpu, release]


def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)


def _pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise cross_compiler.MissingToolError("pybind11 is missing: pip install pybind11") from None
    return str(pybind11.get_cmake_dir())


def assemble(pure: Path, target: Target, modules: dict[str, Path], out: Path) -> Path:
    """A wheel with what the wheel `pure` has, and the modules {name: file}; the same bytes for the same contents."""
    try:
        from wheel.wheelfile import WheelFile
    except ImportError:
        raise cross_compiler.MissingToolError("wheel is missing: pip install wheel") from None
    distribution = pure.name.removesuffix("-py3-none-any.whl")
    path = out / f"{distribution}-{target.tag}.whl"
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(pure) as archive, WheelFile(path, "w") as wheel:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith(("/", "/RECORD"))}
        for name, file in modules.items():
            contents[f"statedict_io/{name}{target.suffix}"] = file.read_bytes()
        # The package first, its metadata last, as PEP 427 recommends.
        for name in sorted(contents, key=lambda name: (".dist-info/" in name, name)):
            content = contents[name]
            if name.endswith(".dist-info/WHEEL"):
                content = _tagged(content.decode(), target).encode()
            info = zipfile.ZipInfo(name, date_time=source_date())
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o755 if name.endswith(".so") else 0o644 | 0o100000) << 16
            wheel.writestr(info, content)
    return path


def _tagged(metadata: str, target: Target) -> str:
    metadata = re.sub(r"^Root-Is-Purelib:.*$", "Root-Is-Purelib: false", metadata, flags=re.MULTILINE)
    return re.sub(r"^Tag:.*$", f"Tag: {target.tag}", metadata, flags=re.MULTILINE)


def source_date() -> tuple[int, int, int, int, int, int]:
    """SOURCE_DATE_EPOCH as a file's date in a zip archive, which begin with 1980."""
    found = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), 315_532_800))
    return found.tm_year, found.tm_mon, found.tm_mday, found.tm_hour, found.tm_min, found.tm_sec


def host() -> Target:
    cpu = {"arm64": "aarch64", "AMD64": "x86_64"}.get(os.uname().machine, os.uname().machine)
    return Target(cpu, f"{sys.version_info.major}.{sys.version_info.minor}")
