"""A C++ compiler for a CPU and an old glibc: clang of PyPI's `ziglang`, with the libstdc++ of Debian's g++.

zig brings the headers and the symbols of any glibc, for any CPU. Its own C++ library is libc++; torch is built with
libstdc++, and what is linked with torch has to be. So libstdc++'s headers are those of g++ for that CPU, and what is
linked against is a stub of libstdc++ that has no symbol later than the oldest system's: the binary then needs the
libstdc++.so.6 and libgcc_s.so.1 of that system, or later ones, and nothing else.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import stub_libraries

ROOT = Path(__file__).resolve().parents[1]
CPUS = ("x86_64", "aarch64")
#: manylinux_2_28: glibc 2.28 and the libraries of GCC 8.
GLIBC = "2.28"
LIBRARIES = {"libstdc++.so.6": {"GLIBCXX": "3.4.24", "CXXABI": "1.3.11"}, "libgcc_s.so.1": {"GCC": "7.0.0"}}


class MissingToolError(Exception):
    """What has to be installed, and how."""


def zig() -> Path:
    spec = find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise MissingToolError("the compiler is missing: pip install ziglang")
    return Path(spec.origin).parent / "zig"


def gxx(cpu: str) -> str:
    """Debian's g++ for that CPU, of which the headers and the libraries are used."""
    found = shutil.which(f"{cpu}-linux-gnu-g++") or (shutil.which("g++") if platform.machine() == cpu else None)
    if found is None:
        package = f"g++-{cpu.replace('_', '-')}-linux-gnu"
        raise MissingToolError(f"the C++ library for {cpu} is missing: apt-get install {package}")
    return found


def header_directories(compiler: str) -> list[Path]:
    """Where g++ looks for the headers of libstdc++."""
    said = subprocess.run(
        [compiler, "-E", "-x", "c++", "-v", "/dev/null"], check=True, capture_output=True, text=True
    ).stderr
    listed = said.partition("#include <...> search starts here:")[2].partition("End of search list.")[0]
    return [Path(line.strip()).resolve() for line in listed.splitlines() if "/c++/" in line]


def library(compiler: str, name: str) -> Path:
    said = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return Path(said.strip()).resolve()


def check(cpu: str) -> None:
    """Raises MissingToolError with all that is missing to build for `cpu`."""
    missing = []
    for find in (zig, lambda: gxx(cpu), readelf, cmake):
        try:
            find()
        except MissingToolError as error:
            missing.append(str(error))
    if missing:
        raise MissingToolError("; ".join(missing))


def readelf() -> None:
    if shutil.which("readelf") is None:
        raise MissingToolError("readelf is missing: apt-get install binutils")


def cmake() -> None:
    if shutil.which("cmake") is None:
        raise MissingToolError("CMake is missing: pip install cmake ninja")


def prepare(cpu: str, directory: Path) -> Path:
    """Writes into `directory` what CMake needs to build for `cpu`, and returns its toolchain file."""
    directory.mkdir(parents=True, exist_ok=True)
    zig_program, gxx_program = zig(), gxx(cpu)
    includes = [ROOT / "cmake" / "glibc_2_28", *header_directories(gxx_program)]
    target = f"{cpu}-linux-gnu.{GLIBC}"
    # -I and not -isystem: these have to be found before zig's headers of C, which they include.
    compiler = directory / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        f'exec "{zig_program}" c++ -target {target} -nostdinc++ -nostdlib++'
        f' {" ".join(f"-I{include}" for include in includes)} "$@"\n'
    )
    compiler.chmod(0o755)

    for name, latest in LIBRARIES.items():
        symbols = stub_libraries.dynamic_symbols(library(gxx_program, name))
        stub_libraries.build(directory / name, stub_libraries.up_to(symbols, latest), compiler)
    later = directory / "later_symbols.o"
    source = ROOT / "cmake" / "glibc_2_28" / "later_symbols.cpp"
    options = ("-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", f"-ffile-prefix-map={ROOT}/=")
    subprocess.run([compiler, *options, "-c", "-o", later, source], check=True)
    # GCC's own part of libgcc before zig's: what zig has for __builtin_cpu_supports() knows no CPU at all.
    libgcc = library(gxx_program, "libgcc.a")
    libraries = " ".join(map(str, [later, *(directory / name for name in LIBRARIES), libgcc]))

    toolchain = directory / "toolchain.cmake"
    toolchain.write_text(
        f"""set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {cpu})
set(CMAKE_CXX_COMPILER "{compiler}")
set(CMAKE_CXX_STANDARD_LIBRARIES "{libraries}")
set(CMAKE_CXX_ARCHIVE_CREATE "\\"{zig_program}\\" ar qcD <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-s")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
"""
    )
    return toolchain
