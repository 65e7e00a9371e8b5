"""Builds wheels from a copy of the sources, so that no build disturbs an extension built in place."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


SCRIPTS = ROOT / "scripts"


CHECK_WHEEL = SCRIPTS / "check_wheel.py"


NOTICE = "WITHOUT its native extension"


def run(*command: str | Path, mode: str = "auto", **environment: str) -> str:
    """The output of a command, which must succeed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STATEDICT_IO_")}
    done = subprocess.run(
        command,
        env={**inherited, "STATEDICT_IO_BUILD": mode, **environment},
        # Not the source tree, whose statedict_io would be imported in place of an installed one.
        cwd=Path(sys.prefix),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def script(name: str) -> ModuleType:
    """A module of scripts/, imported as a script would import it."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


def build_wheel(
    python: str | Path, sources: Path, *options: str, mode: str = "auto", to: Path | None = None, **environment: str
):
    """The wheel built from `sources`, and what the build said."""
    directory = to or sources.parent / "wheels"
    said = run(
        *(python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", directory, *options, sources),
        mode=mode,
        **environment,
    )
    (wheel,) = directory.iterdir()
    return wheel, said


def check_wheel(kind: str, wheel: Path) -> None:
    run(sys.executable, CHECK_WHEEL, kind, wheel)
