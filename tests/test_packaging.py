"""The wheels: what is in them, for which torch, and what happens where the extension cannot be built.

Each build runs on a copy of the sources, so that neither disturbs an extension built in place.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, ModuleType

import pytest
import torch
from conftest import require_native

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
CHECK_WHEEL = SCRIPTS / "check_wheel.py"
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


def modules_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name.split("/")[1].split(".")[0] for name in archive.namelist() if name.endswith(".so"))


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


class TestCheckWheel:
    """What scripts/check_wheel.py finds: it is what the other tests here rely on."""

    SOUND = MappingProxyType(
        {
            "statedict_io/__init__.py": "",
            "statedict_io/py.typed": "",
            "statedict_io/_core.pyi": "",
            "statedict_io-0.1.0.dist-info/METADATA": (
                "Metadata-Version: 2.4\nName: statedict-io\nVersion: 0.1.0\nSummary: A fast, durable drop-in\n"
                "Requires-Python: >=3.10\nRequires-Dist: tqdm; extra == 'progress'\n\nThe README.\n"
            ),
            "statedict_io-0.1.0.dist-info/WHEEL": "Root-Is-Purelib: true\n",
            "statedict_io-0.1.0.dist-info/licenses/LICENSE": "BSD",
        }
    )
    METADATA = "statedict_io-0.1.0.dist-info/METADATA"

    def problems(self, directory: Path, files: dict[str, str | None], name: str = "py3-none-any") -> str:
        wheel = directory / f"statedict_io-0.1.0-{name}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in {**self.SOUND, **files}.items():
                if text is not None:
                    archive.writestr(path, text)
        return "; ".join(script("check_wheel").problems_of_wheel(wheel, "pure"))

    def test_nothing_wrong_with_a_sound_one(self, tmp_path: Path) -> None:
        assert self.problems(tmp_path, {}) == ""

    @pytest.mark.parametrize(
        "files, problem",
        [
            ({"statedict_io/py.typed": None}, "py.typed is missing"),
            ({"statedict_io/_core.pyi": None}, "_core.pyi is missing"),
            ({"statedict_io-0.1.0.dist-info/licenses/LICENSE": None}, "license is missing"),
            ({"tests/test_targets.py": ""}, "tests/test_targets.py does not belong"),
            ({"statedict_io/tests/case.py": ""}, "does not belong"),
            ({"statedict_io/test_saving.py": ""}, "does not belong"),
            ({"statedict_io/checksum.cpp": ""}, "does not belong"),
            ({"statedict_io_other/__init__.py": ""}, "does not belong"),
            ({"statedict_io/_core.cpython-311-x86_64-linux-gnu.so": ""}, "in a pure wheel"),
            ({"statedict_io/weights.bin": "x" * (2 << 20)}, "over 1048576"),
            ({METADATA: SOUND[METADATA].replace("tqdm; extra == 'progress'", "torch")}, "requires ['torch']"),
            ({METADATA: SOUND[METADATA].replace("Requires-Python: >=3.10\n", "")}, "which Python"),
            ({METADATA: None}, "no dist-info"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_wrong_is_named(self, files: dict[str, str | None], problem: str, tmp_path: Path) -> None:
        assert problem in self.problems(tmp_path, files)

    def test_a_pure_one_with_a_platform(self, tmp_path: Path) -> None:
        assert "tagged py3-none-any" in self.problems(tmp_path, {}, name="cp311-cp311-linux_x86_64")

    @pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="needs cc and readelf")
    def test_run_paths_and_paths_of_the_build(self, tmp_path: Path) -> None:
        check = script("check_wheel")
        source = tmp_path / "lib.c"
        # memfd_create came with glibc 2.27.
        source.write_text('#define _GNU_SOURCE\n#include <sys/mman.h>\nint f(void){return memfd_create("x", 0);}\n')

        def built(*options: str) -> bytes:
            run("cc", "-shared", "-fPIC", *options, "-o", tmp_path / "lib.so", source)
            return (tmp_path / "lib.so").read_bytes()

        plain = built("-s")
        assert check.problems_of_extension(plain) == []
        assert check.problems_of_stripped(plain) == []
        assert (2, 27) <= check.glibc_level(plain) < (3, 0)
        assert check.problems_of_tag(Path("x-manylinux_2_26_x86_64.whl"), [plain])
        assert check.problems_of_tag(Path("x-manylinux_2_99_x86_64.whl"), [plain]) == []
        for flag in ("--enable-new-dtags", "--disable-new-dtags"):
            (problem,) = check.problems_of_extension(built(f"-Wl,{flag},-rpath,{tmp_path}"))
            assert "RUNPATH" in problem or "RPATH" in problem
        assert check.problems_of_stripped(built("-g")) == ["the extension is not stripped"]
        source.write_text('const char *where = "/home/someone/build/checksum.cpp";\n')
        assert "/home/someone/build/checksum.cpp" in check.problems_of_stripped(built("-s"))[0]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_extension_in_use_asks_for_nothing_of_this_machine() -> None:
    require_native()
    extension = Path(importlib.import_module("statedict_io._core").__file__).read_bytes()
    check = script("check_wheel")
    assert check.problems_of_extension(extension) == []
    assert (2, 14) <= check.glibc_level(extension) < (3, 0)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The sdist and the wheel that scripts/wheels.py makes, and what it said."""
    for needed in ("build", "auditwheel", "setuptools"):
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
    said = run(sys.executable, sources / "scripts" / "wheels.py", "--no-isolation", "--out", out, *others)
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
        assert "'name': 'native'" in said
        assert wheel.name.startswith("statedict_io-0.1.0-")
        if os.environ.get("STATEDICT_IO_OTHER_PYTHON"):
            assert "other torch: {'name': 'python'" in said

    def test_the_wheel_under_a_torch_that_it_was_not_built_for(
        self, released: tuple[Path, Path, str], tmp_path: Path
    ) -> None:
        """Without the module of this torch; STATEDICT_IO_OTHER_PYTHON names a real one."""
        python = installed(released[1], tmp_path / "venv")
        for module in (tmp_path / "venv").glob("lib/python*/site-packages/statedict_io/_torch_*.so"):
            module.unlink()
        found = script("wheels").probe(python)
        assert found["name"] == "native" and found["auto"] == found["native"] == found["torch"] == "torch's bytes"

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

    def test_with_torch_it_is_native(self, sources: Path, tmp_path: Path) -> None:
        wheel, said = build_wheel(sys.executable, sources)
        assert NOTICE not in said
        check_wheel("native", wheel)
        assert modules_in(wheel) == ["_core", "_torch_{}_{}".format(*torch.__version__.split(".")[:2])]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "unpacked")
        active = run(
            *(sys.executable, "-c", "import statedict_io; print(statedict_io.backend_info().name)"),
            PYTHONPATH=str(tmp_path / "unpacked"),
        )
        assert active.strip().splitlines()[-1] == "native"

    def test_without_torch_it_has_the_core(self, sources: Path, tmp_path: Path) -> None:
        venv.create(tmp_path / "venv", with_pip=True)
        python = tmp_path / "venv" / "bin" / "python"
        wheel, said = build_wheel(python, sources)
        check_wheel("native", wheel)
        assert NOTICE not in said and modules_in(wheel) == ["_core"]
        run(python, "-m", "pip", "install", "--no-index", wheel)
        # torch arrives later: here the one that runs this test.
        (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        (site_packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
        active = run(python, "-c", "import statedict_io; print(statedict_io.backend_info().name)")
        assert active.strip().splitlines()[-1] == "native"
