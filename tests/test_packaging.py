"""The wheels: what is in them, for which torch, and what happens where the extension cannot be built.

Each build runs on a copy of the sources, so that neither disturbs an extension built in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CHECK_WHEEL = ROOT / "scripts" / "check_wheel.py"
NOTICE = "WITHOUT its native extension"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    copy = tmp_path / "sources"
    copy.mkdir()
    # What an editable install left in the package goes along: it must not get into the wheel.
    for name in ("statedict_io", "csrc", "cmake"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


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


def build_wheel(python: str | Path, sources: Path, *options: str, mode: str = "auto", **environment: str):
    """The wheel built from `sources`, and what the build said."""
    directory = sources.parent / "wheels"
    said = run(
        *(python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", directory, *options, sources),
        mode=mode,
        **environment,
    )
    (wheel,) = directory.iterdir()
    return wheel, said


def check_wheel(kind: str, wheel: Path) -> None:
    run(sys.executable, CHECK_WHEEL, kind, wheel)


def can_build_here() -> bool:
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_build_here(), reason="needs setuptools 77 to build without isolation")
class TestPureWheel:
    def test_on_request(self, sources: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources, "--no-build-isolation", mode="pure")
        check_wheel("pure", wheel)
        assert NOTICE in said

    def test_where_no_torch_is_found(self, sources: Path, tmp_path: Path) -> None:
        wheel, said = build_wheel(
            *(sys.executable, sources, "--no-build-isolation"), STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch")
        )
        check_wheel("pure", wheel)
        assert NOTICE in said
        assert str(tmp_path / "torch") in said

    def test_where_the_torch_found_is_too_old(self, sources: Path, tmp_path: Path) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text("__version__ = '2.5.1+cu124'\n")
        wheel, said = build_wheel(
            *(sys.executable, sources, "--no-build-isolation"), STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch")
        )
        check_wheel("pure", wheel)
        assert "torch 2.5.1+cu124" in said

    def test_where_the_compiler_fails(self, sources: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources, "--no-build-isolation", CXX=str(shutil.which("false")))
        check_wheel("pure", wheel)
        assert NOTICE in said

    def test_is_refused_where_native_was_asked_for(self, sources: Path, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="no torch was found"):
            build_wheel(
                *(sys.executable, sources, "--no-build-isolation"),
                mode="native",
                STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch"),
            )


@pytest.mark.long
class TestPlainInstall:
    """`pip install .` as a user types it: isolated, with whatever the environment has."""

    def test_with_torch_it_is_native(self, sources: Path, tmp_path: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources)
        assert NOTICE not in said
        check_wheel("native", wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "unpacked")
        build_info = (tmp_path / "unpacked" / "statedict_io" / "_build_info.py").read_text()
        assert f'TORCH_VERSION = "{torch.__version__}"' in build_info
        assert f"TORCH_CXX11_ABI = {torch.compiled_with_cxx11_abi()}" in build_info
        active = run(
            *(sys.executable, "-c", "import statedict_io; print(statedict_io.backend_info().name)"),
            PYTHONPATH=str(tmp_path / "unpacked"),
        )
        assert active.strip().splitlines()[-1] == "native"

    def test_without_torch_it_is_pure(self, sources: Path, tmp_path: Path) -> None:
        venv.create(tmp_path / "venv", with_pip=True)
        python = tmp_path / "venv" / "bin" / "python"
        wheel, said = build_wheel(python, sources)
        check_wheel("pure", wheel)
        assert NOTICE in said
        run(python, "-m", "pip", "install", "--no-index", wheel)
        # torch arrives later: here the one that runs this test.
        (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        (site_packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
        active = run(python, "-c", "import statedict_io; print(statedict_io.backend_info().name)")
        assert active.strip().splitlines()[-1] != "native"
