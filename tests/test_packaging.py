"""The wheels: what is in them, for which torch, and what happens where the extension cannot be built.

Each build runs on a copy of the sources, so that neither disturbs an extension built in place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
from wheel_building import NOTICE, ROOT, build_wheel, check_wheel, run, script

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


def can_build_here() -> bool:
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_build_here(), reason="needs setuptools 77 to build without isolation")
class TestWheelOfWhatCanBeBuilt:
    def test_on_request(self, sources: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources, "--no-build-isolation", mode="pure")
        check_wheel("pure", wheel)
        assert NOTICE in said

    def test_where_no_torch_is_found(self, sources: Path, tmp_path: Path) -> None:
        _, said = build_wheel(
            *(sys.executable, sources, "--no-build-isolation"),
            STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch"),
            CXX=str(shutil.which("false")),
        )
        assert "WITHOUT _torch" in said and str(tmp_path / "torch") in said

    def test_where_the_torch_found_is_too_old(self, sources: Path, tmp_path: Path) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text("__version__ = '2.5.1+cu124'\n")
        _, said = build_wheel(
            *(sys.executable, sources, "--no-build-isolation"),
            STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch"),
            CXX=str(shutil.which("false")),
        )
        assert "WITHOUT _torch" in said and "torch 2.5.1+cu124" in said

    def test_where_the_compiler_fails(self, sources: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources, "--no-build-isolation", CXX=str(shutil.which("false")))
        check_wheel("pure", wheel)
        assert NOTICE in said

    def test_is_refused_where_native_was_asked_for(self, sources: Path, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="there is no torch at"):
            build_wheel(
                *(sys.executable, sources, "--no-build-isolation"),
                mode="native",
                STATEDICT_IO_TORCH_DIR=str(tmp_path / "torch"),
            )


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The sdist and the wheel that scripts/wheels.py makes, and what it said."""
    for needed in ("build", "auditwheel", "setuptools", "wheel", "ziglang", "pybind11"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("dist")
    # Of the files as git has them: what lies about in the source tree is not what this is about.
    sources = tmp_path_factory.mktemp("checkout") / "statedict_io"
    run("git", "clone", "--quiet", ROOT, sources)
    for changed in tracked_files():
        (sources / changed).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / changed, sources / changed)
    run("git", "-C", sources, "add", "--all")
    others = [f"--other={python}"] if (python := os.environ.get("STATEDICT_IO_OTHER_PYTHON")) else []
    said = run(sys.executable, sources / "scripts" / "wheels.py", "--no-isolation", "--twice", "--out", out, *others)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel, said


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def installed(wheel: Path, directory: Path) -> Path:
    """The Python of a new environment with the wheel, and with the torch that runs this test."""
    return script("wheels").environment_with(wheel, directory, Path(torch.__file__).parents[1])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
class TestReleasedFiles:
    """scripts/wheels.py, and what its files do where it did not try them."""

    def test_the_script_tried_them_out(self, released: tuple[Path, Path, str]) -> None:
        _, wheel, said = released
        assert "no torch: ImportError: statedict_io needs PyTorch" in said
        assert "core imported, torch not imported" in said
        assert said.count("torch: {'name': 'native'") == 1 + bool(os.environ.get("STATEDICT_IO_OTHER_PYTHON"))
        assert "the same bytes when built twice" in said
        assert re.match(r"statedict_io-0\.1\.0-cp3\d+-cp3\d+-manylinux_2_28_", wheel.name)

    def test_the_wheel_under_a_torch_that_none_of_its_modules_is_for(
        self, released: tuple[Path, Path, str], tmp_path: Path
    ) -> None:
        python = installed(released[1], tmp_path / "venv")
        (module,) = (tmp_path / "venv").glob("lib/python*/site-packages/statedict_io/_torch_*.so")
        module.rename(re.sub(r"_torch_\d+_\d+", "_torch_2_6", str(module)))
        found = script("wheels").probe(python)
        assert found["name"] == "native"
        assert found["auto"] == found["native"] == found["python"] == "torch's bytes"

    def test_the_sdist_where_there_is_no_compiler(self, released: tuple[Path, Path, str], tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        wheel, said = build_wheel(
            *(sys.executable, released[0], "--no-build-isolation"),
            PATH=str(tmp_path / "bin"),
            CXX="",
            to=tmp_path / "w",
        )
        assert NOTICE in said and "no C++ compiler was found" in said
        check_wheel("pure", wheel)
        found = script("wheels").probe(installed(wheel, tmp_path / "venv"))
        assert found["name"] == "python" and found["auto"] == "torch's bytes"
        assert "no compiled _core" in found["reason"]


@pytest.mark.long
class TestPlainInstall:
    """`pip install .` as a user types it: isolated, with whatever the environment has."""

    def modules_in(self, wheel: Path) -> set[str]:
        return set(script("check_wheel").modules_in(wheel))

    def test_with_torch_it_is_native(self, sources: Path, tmp_path: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources)
        assert NOTICE not in said
        check_wheel("native", wheel)
        release = "_torch_{}_{}".format(*re.findall(r"\d+", torch.__version__)[:2])
        assert self.modules_in(wheel) == {"_core", release}
        found = script("wheels").probe(installed(wheel, tmp_path / "venv"))
        assert found["name"] == "native" and f"{release} is in use" in found["torch_module"]

    def test_without_torch_it_is_native_for_host_memory(self, sources: Path, tmp_path: Path) -> None:
        venv.create(tmp_path / "venv", with_pip=True)
        wheel, said = build_wheel(tmp_path / "venv" / "bin" / "python", sources)
        check_wheel("native", wheel)
        assert NOTICE not in said and "WITHOUT _torch" in said
        assert self.modules_in(wheel) == {"_core"}
        # torch arrives later: here the one that runs this test.
        found = script("wheels").probe(installed(wheel, tmp_path / "used"))
        assert found["name"] == "native" and found["auto"] == "torch's bytes"
