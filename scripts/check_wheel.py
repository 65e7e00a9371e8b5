#!/usr/bin/env python3
"""Says what is wrong with a wheel of statedict_io, if anything: scripts/check_wheel.py native|pure WHEEL"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ALWAYS = ("statedict_io/__init__.py", "statedict_io/py.typed", "statedict_io/_native.pyi")
EXTENSION = re.compile(r"statedict_io/_native\.[^/]*\.so")
BUILD_INFO = "statedict_io/_build_info.py"


def dynamic_section(shared_object: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(shared_object)
        file.flush()
        return subprocess.run(
            ["readelf", "--dynamic", "--wide", file.name], check=True, capture_output=True, text=True
        ).stdout


def problems_of_extension(shared_object: bytes) -> list[str]:
    section = dynamic_section(shared_object)
    problems = [f"the extension has a {tag}" for tag in ("RPATH", "RUNPATH") if f"({tag})" in section]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    if any("/" in library for library in needed):
        problems.append(f"the extension needs libraries by path: {needed}")
    foreign = [name for name in needed if re.search(r"cuda|cudart|nccl|hip|libpython", name)]
    if foreign:
        problems.append(f"the extension needs {foreign}")
    return problems


def problems_of_wheel(path: Path, kind: str) -> list[str]:
    problems = []
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        problems += [f"{name} is missing" for name in ALWAYS if name not in names]
        problems += [
            f"{name} does not belong in a wheel"
            for name in names
            if not name.startswith(("statedict_io/", "statedict_io-"))
        ]
        problems += [
            f"{command} is installed to run {module}, which is missing"
            for name in names
            if name.endswith(".dist-info/entry_points.txt")
            for command, module in re.findall(r"^(\S+)\s*=\s*([\w.]+):", wheel.read(name).decode(), re.MULTILINE)
            if module.replace(".", "/") + ".py" not in names
        ]
        extensions = [name for name in names if EXTENSION.fullmatch(name)]
        is_pure_tag = path.name.endswith("-py3-none-any.whl")
        if kind == "native":
            if len(extensions) != 1:
                problems.append(f"one extension expected, found {extensions}")
            problems += [problem for name in extensions for problem in problems_of_extension(wheel.read(name))]
            if BUILD_INFO not in names:
                problems.append(f"{BUILD_INFO} is missing")
            if is_pure_tag:
                problems.append("the extension is in a wheel tagged for every platform")
        else:
            problems += [f"{name} is in a pure wheel" for name in (*extensions, BUILD_INFO) if name in names]
            if not is_pure_tag:
                problems.append("a pure wheel must be tagged py3-none-any")
    return problems


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("native", "pure"):
        print(__doc__, file=sys.stderr)
        return 2
    kind, path = arguments
    problems = problems_of_wheel(Path(path), kind)
    for problem in problems:
        print(f"{path}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
