"""Stub libraries: shared libraries with the name and the symbols of real ones, and nothing in them.

What is linked against a stub finds the real library when it is loaded. Linking against one needs neither the library
nor the processor it is for, and a stub can leave out symbols that an older system lacks. `readelf` (binutils) reads the
symbols of the real ones, whatever processor they are for.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# "   42: 0000000000091a20   118 FUNC    WEAK   DEFAULT   13 _ZNSt6thread4joinEv@@GLIBCXX_3.4.11"
SYMBOL = re.compile(
    r"\s*\d+:\s+[0-9a-f]+\s+\S+\s+(?P<kind>\w+)\s+(?P<binding>\w+)\s+DEFAULT\s+(?P<section>\w+)\s+"
    r"(?P<name>[^\s@]+)(?:@{1,2}(?P<version>\S+))?"
)


class Symbol(NamedTuple):
    name: str
    version: str | None
    is_defined: bool
    is_weak: bool
    is_thread_local: bool


def dynamic_symbols(library: Path) -> list[Symbol]:
    """The symbols that a shared library offers to others, and asks of others."""
    listed = subprocess.run(
        ["readelf", "--wide", "--dyn-syms", library], check=True, capture_output=True, text=True
    ).stdout
    return [
        Symbol(
            *(found["name"], found["version"]),
            is_defined=found["section"] != "UND",
            is_weak=found["binding"] == "WEAK",
            is_thread_local=found["kind"] == "TLS",
        )
        for found in map(SYMBOL.match, listed.splitlines())
        if found and found["section"] != "ABS"
    ]


def numbers_in(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def up_to(symbols: Iterable[Symbol], latest: dict[str, str]) -> list[Symbol]:
    """The defined symbols; of several versions of one the last that is not after `latest`.

    `latest` has the last version of each series: {"GLIBCXX": "3.4.24"} leaves out GLIBCXX_3.4.25 and all of CXXABI.
    """
    kept: dict[str, Symbol] = {}
    for symbol in symbols:
        series, _, number = (symbol.version or "").rpartition("_")
        if not symbol.is_defined or series not in latest or not number[:1].isdigit():
            continue
        if numbers_in(number) > numbers_in(latest[series]):
            continue
        before = kept.get(symbol.name)
        if before is None or numbers_in(before.version or "") < numbers_in(number):
            kept[symbol.name] = symbol
    return list(kept.values())


def build(path: Path, symbols: Iterable[Symbol], compiler: Path) -> None:
    """A stub at `path`, which is named as the real library names itself (its SONAME)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(symbols)
    assembly = path.with_name(path.name + ".s")
    assembly.write_text("".join(map(_definition, ordered)))
    options = [f"-Wl,-soname,{path.name}"]
    by_version: dict[str, list[str]] = {}
    for symbol in ordered:
        if symbol.version is not None:
            by_version.setdefault(symbol.version, []).append(symbol.name)
    if by_version:
        script = path.with_name(path.name + ".versions")
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{chr(34)}{name}{chr(34)};' for name in names)} }};\n"
                for version, names in sorted(by_version.items())
            )
        )
        options.append(f"-Wl,--version-script={script}")
    subprocess.run([compiler, "-shared", "-nostdlib", *options, "-o", path, assembly], check=True)


def _definition(symbol: Symbol) -> str:
    if symbol.is_thread_local:
        place = f'.section .tbss,"awT",@nobits\n.type "{symbol.name}",@tls_object\n'
    else:
        place = ".text\n"
    return f'{place}.globl "{symbol.name}"\n"{symbol.name}":\n'
