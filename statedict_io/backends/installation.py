"""How this package was installed, and the command that puts its compiled modules right."""

from __future__ import annotations

import json
import os
import sys

_NAME = "statedict-io"
_BUILD = "STATEDICT_IO_BUILD=native"
_AGAIN = "--force-reinstall --no-deps"
_REBUILD = f"{_BUILD} pip install {_AGAIN} --no-cache-dir ., in the source tree"


def cure(*, newer: bool = False) -> str:
    """A command, in words that fit into a sentence.

    Args:
        newer: a later release may help; otherwise the same release has to be installed again.
    """
    pip = _pip_where_a_wheel_was_installed()
    if pip is None:
        return f"with newer sources: {_REBUILD}" if newer else f"to rebuild it: {_REBUILD}"
    if newer:
        return f"to get a newer release: {pip} install --upgrade {_NAME}"
    return f"to install it again: {pip} install --upgrade {_AGAIN} {_NAME}"


def cure_by_building() -> str:
    """The same for the command that compiles the package here, against the torch that is installed."""
    pip = _pip_where_a_wheel_was_installed()
    if pip is None:
        return f"to build it: {_REBUILD}"
    return (
        f"to build it, which needs a C++ compiler: {_BUILD} {pip} install {_AGAIN} --no-cache-dir "
        f"--no-binary {_NAME} {_NAME}"
    )


def _pip_where_a_wheel_was_installed() -> str | None:
    """The installer's command; None where this package was built here, or is used from its source tree."""
    from importlib.metadata import PackageNotFoundError, distribution

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        found = distribution(_NAME)
        # An editable installation and PYTHONPATH lead to sources; another copy may be installed beside these.
        if not os.path.samefile(str(found.locate_file(os.path.basename(package))), package):
            return None
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        tags = [line for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
        installer = (found.read_text("INSTALLER") or "pip").strip()
    except (PackageNotFoundError, OSError, ValueError):
        return None
    url = str(origin.get("url", ""))
    if origin and not url.endswith(".whl"):  # a directory, a repository or an archive of sources
        return None
    # What was built here for Linux says "linux", a wheel that was made to be passed on names the system it needs.
    if sys.platform == "linux" and not url and any(tag.partition("-linux_")[1] for tag in tags):
        return None
    return "uv pip" if installer == "uv" else "pip"
