#!/usr/bin/env python3
"""Tries wheels under several Pythons and torches, and prints the version table of docs/install.md:

    scripts/matrix.py --wheel FILE_OR_DIRECTORY [--python PYTHON]... [--torch RELEASE]... [--environment PYTHON]...
                      [--tests FILE]... [--directory build/matrix]

For each --python (3.12, or an interpreter; default: this one) and each --torch (2.14.1; default: the last that pip
finds) a virtual environment is made in --directory, or found there from before, with that torch and with what the tests
need. The wheel that fits is installed into it, where no compiler is found, and the tests run in it: those named by
--tests, or CORE_TESTS. --environment adds an environment that has a torch already: its packages are used, nothing is
installed into it.

What cannot be had (no such Python, no torch for it, no wheel that fits) is a line of the table too. Exits with 1 where
a test failed or the backend was not native.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import wheels

ROOT = Path(__file__).resolve().parents[1]
#: Formats, saving, loading, settings, backends: what depends on the torch and the Python that are there.
CORE_TESTS = (
    "test_backends.py",
    "test_byte_identity.py",
    "test_checkpoint.py",
    "test_checkpoint_objects.py",
    "test_errors.py",
    "test_fastsave.py",
    "test_frozen_files.py",
    "test_kinds.py",
    "test_lean_pickle.py",
    "test_load_as_torch.py",
    "test_load_back.py",
    "test_targets.py",
    "test_torch_settings.py",
    "test_verification.py",
    "test_weights_only.py",
)
TEST_REQUIREMENTS = ("pytest", "pytest-timeout", "hypothesis", "numpy", "dill", "cloudpickle", "tqdm", "fsspec")
#: What runs in an environment, as JSON on the last line.
FACTS = """
import json, platform, torch, statedict_io as sio
info = sio.backend_info()
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "backend": info.name,
                  "reason": info.reason, "torch_module": str(info.torch_module)}))
"""


class NotHereError(Exception):
    """Why a combination cannot be tried on this machine."""


class Row(NamedTuple):
    python: str
    torch: str
    backend: str
    torch_module: str
    tests: str
    is_good: bool


def output_of(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=sys.prefix,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise NotHereError(f"{command[0]} exited with status {done.returncode}: {done.stdout.strip()[-300:]}")
    return done.stdout


def interpreter(wish: str) -> Path:
    """The interpreter for "3.12", or for what is one itself."""
    if not re.fullmatch(r"3\.\d+", wish):
        return Path(wish)
    if wish == ".".join(map(str, sys.version_info[:2])):
        return Path(sys.executable)
    candidates = [shutil.which(f"python{wish}"), *map(str, Path.home().glob(f".pyenv/versions/{wish}.*/bin/python"))]
    for candidate in filter(None, candidates):
        try:
            if output_of(candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')").split()[-1] == wish:
                return Path(candidate)
        except NotHereError:  # a shim for a version that is not installed
            continue
    raise NotHereError(f"there is no Python {wish}")


def environment_of_torch(python: Path, torch: str | None, directory: Path) -> Path:
    """The Python of an environment with that torch, made unless it is there."""
    version = output_of(python, "-c", "import platform; print(platform.python_version())").split()[-1]
    environment = directory / f"python{version}-torch{torch or ''}"
    own = environment / "bin" / "python"
    if not (environment / "complete").exists():
        shutil.rmtree(environment, ignore_errors=True)
        output_of(python, "-m", "venv", environment)
        output_of(own, "-m", "pip", "install", "--quiet", f"torch=={torch}" if torch else "torch", *TEST_REQUIREMENTS)
        (environment / "complete").touch()
    return own


def environment_beside(python: Path, directory: Path) -> Path:
    """The Python of a new environment that sees the packages of another."""
    if not python.is_file():
        raise NotHereError(f"{python} is not there")
    site_packages = wheels.site_packages_of(str(python))
    environment = directory / "beside"
    shutil.rmtree(environment, ignore_errors=True)
    output_of(python, "-m", "venv", environment)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "torch.pth").write_text(f"{site_packages}\n")
    output_of(environment / "bin" / "python", "-m", "pip", "install", "--quiet", *TEST_REQUIREMENTS)
    return environment / "bin" / "python"


def fitting(wheel: Path, python: Path) -> Path:
    """The wheel itself, or that of a directory for this Python and CPU."""
    if wheel.is_file():
        return wheel
    tag = output_of(python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])").split()[-1]
    found = sorted(wheel.glob(f"statedict_io-*-{tag}-{tag}-*_{platform.machine()}.whl"))
    if not found:
        raise NotHereError(f"no wheel for {tag} on {platform.machine()} in {wheel}")
    return found[-1]


def run_tests(python: Path, tests: list[str], log: Path) -> tuple[str, bool]:
    """Counts, and whether all is well. The tests run on the installed package, in a copy that has no other."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        report = copy / "report.xml"
        environment = {name: value for name, value in os.environ.items() if not re.match("STATEDICT_IO_|PYTHON", name)}
        with log.open("w") as said:
            done = subprocess.run(
                [python, "-m", "pytest", "-q", f"--junitxml={report}", *(f"tests/{test}" for test in tests)],
                env={**environment, "CC": "false", "CXX": "false", "STATEDICT_IO_REQUIRE_NATIVE": "1"},
                cwd=copy,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        if not report.is_file():
            return f"did not run: see {log}", False
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return f"{passed} passed, {failed} failed, {counts['skipped']} skipped", done.returncode == 0


def try_in(python: Path, wheel: Path, tests: list[str], directory: Path) -> Row:
    output_of(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", wheel)
    facts = json.loads(output_of(python, "-c", FACTS, PYTHONPATH="").splitlines()[-1])
    log = directory / f"python{facts['python']}-torch{facts['torch']}.log"
    counts, is_good = run_tests(python, tests, log)
    if not is_good:
        print(f"{counts}: {log}", file=sys.stderr)
    backend = facts["backend"] if facts["backend"] == "native" else f"{facts['backend']}: {facts['reason']}"
    is_good = is_good and facts["backend"] == "native"
    module = re.match(r"(_torch_\d+_\d+) is in use", facts["torch_module"])
    shown = f"`{module[1]}`" if module else "none for it"
    return Row(facts["python"], facts["torch"], backend, shown, counts, is_good)


def print_table(rows: list[Row]) -> None:
    print("| Python | torch | backend | `_torch` | core tests |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.python} | {row.torch} | {row.backend} | {row.torch_module} | {row.tests} |")
    system = f"{platform.system()} {platform.machine()}, {'glibc ' + platform.libc_ver()[1]}"
    print(f"\n{system}, {datetime.date.today().isoformat()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--torch", action="append", default=[])
    parser.add_argument("--environment", type=Path, action="append", default=[], metavar="PYTHON")
    parser.add_argument("--tests", action="append", default=[], metavar="FILE")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "matrix")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    wheel: Path = arguments.wheel.resolve()
    tests = arguments.tests or list(CORE_TESTS)

    pythons = arguments.python or ([] if arguments.environment else [sys.executable])
    torches: list[str | None] = arguments.torch or [None]
    rows = []
    for python, torch in itertools.product(pythons, torches):
        try:
            own = environment_of_torch(interpreter(python), torch, directory)
            rows.append(try_in(own, fitting(wheel, own), tests, directory))
        except NotHereError as error:
            rows.append(Row(python, torch or "the last", "-", "-", str(error).replace("\n", " "), True))
    for environment in arguments.environment:
        try:
            own = environment_beside(environment.absolute(), directory)
            rows.append(try_in(own, fitting(wheel, own), tests, directory))
        except NotHereError as error:
            rows.append(Row(str(environment), "-", "-", "-", str(error).replace("\n", " "), True))
    print_table(rows)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
