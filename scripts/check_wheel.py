#!/usr/bin/env python3
"""Says what is wrong with a wheel of statedict_io, if anything: scripts/check_wheel.py native|pure WHEEL

Looks at the file alone: what is in it, what its extension asks of a system, how large it is. Needs readelf (binutils)
for a native wheel. scripts/wheels.py builds wheels and tries them out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

ALWAYS = ("statedict_io/__init__.py", "statedict_io/py.typed", "statedict_io/_core.pyi")
CORE = re.compile(r"statedict_io/_core\.[^/]*\.so")
EXTENSION = re.compile(r"statedict_io/_(core|torch_\d+_\d+)\.[^/]*\.so")
DIST_INFO = re.compile(r"statedict_io-[^/]*\.dist-info/")
# Of all platforms: what a build or a test leaves behind, and what only a build needs.
DOES_NOT_BELONG = re.compile(r"(^|/)(tests?|build|__pycache__)/|(^|/)(test_[^/]*|conftest)\.py$|\.(cpp|h|o|a|pyc|pt)$")
# Some three times what they are: a debug build, a bundled libtorch or test data would exceed them.
MAX_WHEEL_NBYTES = {"native": 2 << 20, "pure": 1 << 20}
MAX_EXTENSION_NBYTES = 3 << 20


def readelf(shared_object: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(shared_object)
        file.flush()
        return subprocess.run(
            ["readelf", "--wide", *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def glibc_level(shared_object: bytes) -> tuple[int, int]:
    """The oldest glibc that has all the symbols the library asks for; (0, 0) where it asks for none."""
    needs = readelf(shared_object, "--version-info")
    return max(
        ((int(major), int(minor)) for major, minor in re.findall(r"Name: GLIBC_(\d+)\.(\d+)", needs)), default=(0, 0)
    )


def problems_of_extension(shared_object: bytes) -> list[str]:
    section = readelf(shared_object, "--dynamic")
    problems = [f"the extension has a {tag}" for tag in ("RPATH", "RUNPATH") if f"({tag})" in section]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    if any("/" in library for library in needed):
        problems.append(f"the extension needs libraries by path: {needed}")
    foreign = [name for name in needed if re.search(r"cuda|cudart|nccl|hip|libpython", name)]
    if foreign:
        problems.append(f"the extension needs {foreign}")
    return problems


def problems_of_stripped(shared_object: bytes) -> list[str]:
    """Of an extension in a wheel, over those of one that was built in place."""
    problems = []
    if re.search(r"\.symtab|\.debug_", readelf(shared_object, "--sections")):
        problems.append("the extension is not stripped")
    if len(shared_object) > MAX_EXTENSION_NBYTES:
        problems.append(f"the extension has {len(shared_object)} bytes, over {MAX_EXTENSION_NBYTES}")
    paths = re.findall(rb"/[\w./+-]*/(?:site-packages|csrc|build)/[\w./+-]*", shared_object)
    if paths:
        problems.append(f"the extension names paths of the machine that built it: {paths[0].decode()}")
    return problems


def problems_of_metadata(names: list[str], wheel: zipfile.ZipFile) -> list[str]:
    texts = {kind: wheel.read(n).decode() for n in names for kind in ("METADATA", "WHEEL") if n.endswith(f"/{kind}")}
    if len(texts) != 2:
        return ["it has no dist-info with METADATA and WHEEL"]
    metadata: Message = HeaderParser().parsestr(texts["METADATA"])
    problems = []
    if not any(re.search(r"\.dist-info/licenses/LICENSE$", name) for name in names):
        problems.append("the license is missing")
    if not metadata["Requires-Python"]:
        problems.append("it does not say which Python it needs")
    if unconditional := [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]:
        problems.append(f"it requires {unconditional}: pip would replace the torch that is there")
    if "fast, durable" not in metadata.get("Summary", "") or not metadata.get_payload():
        problems.append("it has no summary or no README")
    return problems


def problems_of_tag(path: Path, extensions: list[bytes]) -> list[str]:
    promised = re.search(r"manylinux_(\d+)_(\d+)", path.name)
    if promised is None:
        return []
    level = max(map(glibc_level, extensions), default=(0, 0))
    if level <= (int(promised[1]), int(promised[2])):
        return []
    return [f"it is tagged {promised[0]}, but needs glibc {level[0]}.{level[1]}"]


def problems_of_wheel(path: Path, kind: str) -> list[str]:
    problems = []
    nbytes = path.stat().st_size
    if nbytes > MAX_WHEEL_NBYTES[kind]:
        problems.append(f"it has {nbytes} bytes, over {MAX_WHEEL_NBYTES[kind]}")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        problems += [f"{name} is missing" for name in ALWAYS if name not in names]
        problems += [
            f"{name} does not belong in a wheel"
            for name in names
            if not (name.startswith("statedict_io/") or DIST_INFO.match(name)) or DOES_NOT_BELONG.search(name)
        ]
        problems += [
            f"{command} is installed to run {module}, which is missing"
            for name in names
            if name.endswith(".dist-info/entry_points.txt")
            for command, module in re.findall(r"^(\S+)\s*=\s*([\w.]+):", wheel.read(name).decode(), re.MULTILINE)
            if module.replace(".", "/") + ".py" not in names
        ]
        problems += problems_of_metadata(names, wheel)
        extensions = [name for name in names if EXTENSION.fullmatch(name)]
        is_pure_tag = path.name.endswith("-py3-none-any.whl")
        if kind == "native":
            if len([name for name in extensions if CORE.fullmatch(name)]) != 1:
                problems.append(f"one _core expected, found {extensions}")
            contents = [wheel.read(name) for name in extensions]
            for content in contents:
                problems += problems_of_extension(content) + problems_of_stripped(content)
            problems += problems_of_tag(path, contents)
            if is_pure_tag:
                problems.append("the extension is in a wheel tagged for every platform")
        else:
            problems += [f"{name} is in a pure wheel" for name in extensions]
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
