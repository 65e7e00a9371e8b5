#!/usr/bin/env python3
"""Says what is wrong with a wheel of statedict_io, if anything: scripts/check_wheel.py native|pure WHEEL

Looks at the file alone: what is in it, what its modules ask of a system and of torch, how large it is. Needs readelf
(binutils) for a native wheel. scripts/wheels.py builds wheels and tries them out.
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
MODULE = re.compile(r"statedict_io/(_core|_torch_\d+_\d+)\.[^/]*\.so")
DIST_INFO = re.compile(r"statedict_io-[^/]*\.dist-info/")
# Of all platforms: what a build or a test leaves behind, and what only a build needs.
DOES_NOT_BELONG = re.compile(r"(^|/)(tests?|build|__pycache__)/|(^|/)(test_[^/]*|conftest)\.py$|\.(cpp|h|o|a|pyc|pt)$")
# Some times what they are: a debug build, a bundled libtorch or test data would exceed them.
MAX_WHEEL_NBYTES = {"native": 15 << 20, "pure": 1 << 20}
MAX_MODULE_NBYTES = 3 << 20
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+")
TORCHS_LIBRARIES = re.compile(r"lib(c10|torch|torch_cpu|torch_python)\.so")
# Mangled names with one of torch's namespaces, and the C functions of its Python objects.
TORCHS_SYMBOLS = re.compile(r"_Z\w*?(3c10|2at|5torch|6caffe2)|THP|TH[A-Z]")


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


def modules_in(wheel: Path) -> dict[str, bytes]:
    """The compiled modules of a wheel: {"_core": the file's bytes}."""
    with zipfile.ZipFile(wheel) as archive:
        return {found[1]: archive.read(found[0]) for found in map(MODULE.fullmatch, archive.namelist()) if found}


def dynamic_symbols(shared_object: bytes) -> list[tuple[str, str, str, str]]:
    """Binding, section ("UND": asked of others), name and version, which may be empty."""
    return re.findall(r" (\w+) +\w+ +(UND|\d+) (\w+)(@\S+)?", readelf(shared_object, "--dyn-syms"))


def problems_of_module(name: str, shared_object: bytes) -> list[str]:
    """Of a compiled module, in a wheel or built in place."""
    section = readelf(shared_object, "--dynamic")
    problems = [f"{name} has a {tag}" for tag in ("RPATH", "RUNPATH") if f"({tag})" in section]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    allowed = [SYSTEM_LIBRARIES] if name == "_core" else [SYSTEM_LIBRARIES, TORCHS_LIBRARIES]
    if foreign := [library for library in needed if not any(kind.fullmatch(library) for kind in allowed)]:
        problems.append(f"{name} needs {foreign}")
    symbols = dynamic_symbols(shared_object)
    if name == "_core" and (of_torch := [symbol for *_, symbol, _ in symbols if TORCHS_SYMBOLS.match(symbol)]):
        problems.append(f"_core has symbols of torch: {of_torch[:5]}")
    if not any(symbol == f"PyInit_{name}" and section != "UND" for _, section, symbol, _ in symbols):
        problems.append(f"{name} is no Python module")
    return problems


def problems_of_released(name: str, shared_object: bytes) -> list[str]:
    """Of a module in a wheel, over those of one that was built in place."""
    problems = []
    if re.search(r"\.symtab|\.debug_", readelf(shared_object, "--sections")):
        problems.append(f"{name} is not stripped")
    if len(shared_object) > MAX_MODULE_NBYTES:
        problems.append(f"{name} has {len(shared_object)} bytes, over {MAX_MODULE_NBYTES}")
    paths = re.findall(rb"/[\w./+-]*/(?:site-packages|csrc|build)/[\w./+-]*", shared_object)
    if paths:
        problems.append(f"{name} names paths of the machine that built it: {paths[0].decode()}")
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


def unversioned(name: str, shared_object: bytes) -> list[str]:
    """What a module asks of the system's libraries without saying of which version: they may lack it.

    Python and torch do not version their symbols. A module that is linked with one build of torch may take symbols of
    the C++ library from it, which another build need not have.
    """
    return [
        symbol
        for binding, section, symbol, version in dynamic_symbols(shared_object)
        if (binding, section, version) == ("GLOBAL", "UND", "") and not re.match(r"_?Py", symbol)
        if name == "_core" or not TORCHS_SYMBOLS.match(symbol)
    ]


def problems_of_tag(path: Path, modules: dict[str, bytes]) -> list[str]:
    promised = re.search(r"manylinux_(\d+)_(\d+)", path.name)
    if promised is None:
        return []
    problems = []
    for name, shared_object in modules.items():
        level = glibc_level(shared_object)
        if level > (int(promised[1]), int(promised[2])):
            problems.append(f"it is tagged {promised[0]}, but {name} needs glibc {level[0]}.{level[1]}")
        if unresolved := unversioned(name, shared_object):
            problems.append(f"it is tagged {promised[0]}, but {name} needs {unresolved[:5]} of no version")
    return problems


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
    modules = modules_in(path)
    is_pure_tag = path.name.endswith("-py3-none-any.whl")
    if kind == "native":
        if "_core" not in modules:
            problems.append("_core is missing")
        for name, content in modules.items():
            problems += problems_of_module(name, content) + problems_of_released(name, content)
        problems += problems_of_tag(path, modules)
        if is_pure_tag:
            problems.append("compiled modules are in a wheel tagged for every platform")
        if re.search(r"-\d[^-]*\+", path.name):
            problems.append("its version has a local label, which an index refuses")
    else:
        problems += [f"{name} is in a pure wheel" for name in modules]
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
