#!/usr/bin/env python3
"""Collects the headers that wheels are built with, into a folder that scripts/wheels.py is given with --headers:

  scripts/headers.py --headers DIR [--torch RELEASE_OR_WHEEL]... [--python INTERPRETER_OR_DEB]...

--torch   a release as pip knows it, such as 2.14.1, whose wheel pip downloads (hundreds of MB, once), or the path of
          a wheel. Kept of it: include/, version.py, and the names of the symbols in its libraries, to link against.
          One build of a release serves all CPUs and Pythons, CUDA or not. (2.6 and before: all but the CPUs whose
          builds have another std::string; --torch-platform names the platform to download for.)
--python  an interpreter whose headers are taken, such as python3.12, or a Debian package libpython3.14-dev_*.deb.
          Those of x86-64 serve aarch64 too: what differs in pyconfig.h is of no concern to an extension.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import check_wheel
import stub_libraries

LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch_python.so")
PLATFORM = "manylinux_2_28_aarch64"


class WrongHeadersError(Exception):
    """Why headers cannot be had."""


def release_of(version: str) -> str:
    """ "2.14" of "2.14.1+cpu"."""
    return ".".join(re.findall(r"\d+", version)[:2])


def torch_headers(headers: Path, release: str) -> Path:
    """The folder of torch's headers for a release such as "2.14"."""
    directory = headers / f"torch-{release}"
    if not (directory / "version.py").is_file():
        raise WrongHeadersError(
            f"no headers of torch {release} in {headers}: scripts/headers.py --headers {headers} --torch {release}.0"
        )
    return directory


def python_headers(headers: Path, version: str) -> Path:
    """The folder of Python.h for a version such as "3.11"."""
    directory = headers / f"python-{version}"
    if not (directory / "Python.h").is_file():
        raise WrongHeadersError(
            f"no headers of Python {version} in {headers}:"
            f" scripts/headers.py --headers {headers} --python python{version}"
        )
    return directory


def symbols_of(torch: Path, library: str) -> list[stub_libraries.Symbol]:
    """What a library of torch offers, from the folder of its headers."""
    lines = (torch / "lib" / library).with_suffix(".symbols").read_text().splitlines()
    split = (line.partition(" ") for line in lines)
    return [
        stub_libraries.Symbol(name, None, is_defined=True, is_weak=False, is_thread_local=kind == "tls")
        for name, _, kind in split
    ]


def download_torch(release: str, platform: str, to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", to]
    subprocess.run(
        [*command, "--platform", platform, "--python-version", "3.11", f"torch=={release}"],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    (wheel,) = to.glob("torch-*.whl")
    return wheel


def version_of(version_py: str) -> str:
    found = re.search(r"""^__version__\b[^=\n]*=\s*["']([^"']+)["']""", version_py, re.MULTILINE)
    if found is None:
        raise WrongHeadersError("torch/version.py names no version")
    return found[1]


def add_torch(headers: Path, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=headers) as scratch:
        wanted = ["torch/version.py", *(n for n in archive.namelist() if n.startswith("torch/include/"))]
        archive.extractall(scratch, [*wanted, *(f"torch/lib/{library}" for library in LIBRARIES)])
        return add_torch_of_directory(headers, Path(scratch, "torch"))


def add_torch_of_directory(headers: Path, package: Path) -> Path:
    directory = headers / f"torch-{release_of(version_of((package / 'version.py').read_text()))}"
    shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=headers) as scratch:
        kept = Path(scratch, "torch")
        shutil.copytree(package / "include", kept / "include")
        (kept / "lib").mkdir()
        for library in LIBRARIES:
            keep_symbols(package / "lib" / library, kept / "lib")
        shutil.copy(package / "version.py", kept)
        kept.rename(directory)
    return directory


def keep_symbols(library: Path, to: Path) -> None:
    """Writes a list of the symbols of torch that a library offers.

    Left out are those of the C++ library, of which torch's builds carry some for old systems: another build may not.
    """
    offered = {
        f"{symbol.name}{' tls' * symbol.is_thread_local}\n"
        for symbol in stub_libraries.dynamic_symbols(library)
        if symbol.is_defined and check_wheel.TORCHS_SYMBOLS.match(symbol.name)
    }
    (to / library.name).with_suffix(".symbols").write_text("".join(sorted(offered)))


def add_python_of_interpreter(headers: Path, interpreter: str) -> Path:
    asked = "import sys, sysconfig as s; print(*sys.version_info[:2], sep='.'); print(s.get_path('include'))"
    done = subprocess.run([interpreter, "-c", asked], check=True, capture_output=True, text=True)
    version, include = done.stdout.splitlines()
    if not Path(include, "Python.h").is_file():
        raise WrongHeadersError(f"{interpreter} came without headers: {include}/Python.h is missing")
    return _keep(headers / f"python-{version}", Path(include), None)


def add_python_of_deb(headers: Path, package: Path) -> Path:
    if shutil.which("dpkg-deb") is None:
        raise WrongHeadersError("dpkg-deb is missing: apt-get install dpkg")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "--extract", package, scratch], check=True)
        (include,) = Path(scratch, "usr", "include").glob("python3.*")
        # In Debian pyconfig.h only includes the one of the processor.
        (config,) = Path(scratch, "usr", "include").glob(f"*-linux-gnu/{include.name}/pyconfig.h")
        return _keep(headers / include.name.replace("python", "python-"), include, config)


def _keep(directory: Path, include: Path, config: Path | None) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(include, directory)
    if config is not None:
        shutil.copy(config, directory / "pyconfig.h")
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--torch", action="append", default=[], metavar="RELEASE_OR_WHEEL")
    parser.add_argument("--torch-platform", default=PLATFORM, metavar="TAG", help=f"of what pip downloads: {PLATFORM}")
    parser.add_argument("--python", action="append", default=[], metavar="INTERPRETER_OR_DEB")
    arguments = parser.parse_args()
    headers: Path = arguments.headers.resolve()
    headers.mkdir(parents=True, exist_ok=True)
    for torch in arguments.torch:
        with tempfile.TemporaryDirectory(dir=headers) as scratch:
            is_file = torch.endswith(".whl")
            wheel = Path(torch) if is_file else download_torch(torch, arguments.torch_platform, Path(scratch))
            print(add_torch(headers, wheel), flush=True)
    for python in arguments.python:
        is_package = python.endswith(".deb")
        added = add_python_of_deb(headers, Path(python)) if is_package else add_python_of_interpreter(headers, python)
        print(added, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (WrongHeadersError, subprocess.CalledProcessError) as wrong:
        print(f"WRONG: {wrong}", file=sys.stderr)
        sys.exit(1)
