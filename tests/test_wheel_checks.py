"""What looks at wheels before they are released: check_wheel.py, the stub libraries that they are linked to."""

from __future__ import annotations

import importlib
import shutil
import zipfile
from pathlib import Path
from types import MappingProxyType

import pytest
from conftest import require_native
from wheel_building import ROOT, run, script

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


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
            ({"statedict_io/_core.cpython-311-x86_64-linux-gnu.so": ""}, "_core is in a pure wheel"),
            ({"statedict_io/_torch_2_13.cpython-311-x86_64-linux-gnu.so": ""}, "_torch_2_13 is in a pure wheel"),
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
        # memfd_create came with glibc 2.27.
        source = """#define _GNU_SOURCE
        #include <sys/mman.h>
        void *PyInit__core(void) { return (void *)(long)memfd_create("x", 0); }
        """
        plain = shared_object(tmp_path, source, "-s")
        assert check.problems_of_module("_core", plain) == []
        assert check.problems_of_module("_torch_2_13", plain) == ["_torch_2_13 is no Python module"]
        assert check.problems_of_released("_core", plain) == []
        assert (2, 27) <= check.glibc_level(plain) < (3, 0)
        assert check.problems_of_tag(Path("x-manylinux_2_26_x86_64.whl"), {"_core": plain})
        assert check.problems_of_tag(Path("x-manylinux_2_99_x86_64.whl"), {"_core": plain}) == []
        for flag in ("--enable-new-dtags", "--disable-new-dtags"):
            linked = shared_object(tmp_path, source, f"-Wl,{flag},-rpath,{tmp_path}")
            (problem,) = check.problems_of_module("_core", linked)
            assert "RUNPATH" in problem or "RPATH" in problem
        assert check.problems_of_released("_core", shared_object(tmp_path, source, "-g")) == ["_core is not stripped"]
        named = shared_object(tmp_path, 'const char *where = "/home/someone/build/checksum.cpp";', "-s")
        assert "/home/someone/build/checksum.cpp" in check.problems_of_released("_core", named)[0]

    @pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="needs cc and readelf")
    def test_what_modules_ask_of_others(self, tmp_path: Path) -> None:
        check = script("check_wheel")
        of_torch = "void _ZN3c105ErrorC1Ev(void); void *PyInit_{}(void) {{ _ZN3c105ErrorC1Ev(); return 0; }}"
        (problem,) = [
            problem
            for problem in check.problems_of_module("_core", shared_object(tmp_path, of_torch.format("_core")))
            if "symbols of torch" in problem
        ]
        assert "_ZN3c105ErrorC1Ev" in problem
        name = "_torch_2_13"
        built = shared_object(tmp_path, of_torch.format(name), "-s")
        assert check.problems_of_module(name, built) + check.unversioned(name, built) == []
        unknown = "void nobody_has_this(void); void *PyInit__core(void) { nobody_has_this(); return 0; }"
        (problem,) = check.problems_of_tag(
            Path("x-manylinux_2_99_x86_64.whl"), {"_core": shared_object(tmp_path, unknown)}
        )
        assert "nobody_has_this" in problem
        (tmp_path / "libc10.so").write_bytes(shared_object(tmp_path, "int torchs;", "-Wl,-soname,libc10.so"))
        needs = ("-Wl,--no-as-needed", str(tmp_path / "libc10.so"))
        assert check.problems_of_module(name, shared_object(tmp_path, of_torch.format(name), *needs)) == []
        of_core = "void *PyInit__core(void) { return 0; }"
        assert check.problems_of_module("_core", shared_object(tmp_path, of_core, *needs)) == [
            "_core needs ['libc10.so']"
        ]


def shared_object(directory: Path, source: str, *options: str) -> bytes:
    """What the C compiler makes of `source`."""
    (directory / "lib.c").write_text(source)
    run("cc", "-shared", "-fPIC", "-o", directory / "lib.so", directory / "lib.c", *options)
    return (directory / "lib.so").read_bytes()


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="needs cc and readelf")
class TestStubLibraries:
    """What wheels for other systems are linked against."""

    SOURCE = """
    void kept(void) {}
    void old(void) {}
    void new(void) {}
    void later(void) {}
    __asm__(".symver old, both@V_1.0\\n.symver new, both@@V_1.2");
    __thread int counter;
    """
    VERSIONS = (
        "V_1.0 { global: kept; counter; both; local: *; }; V_1.2 { global: both; } V_1.0;"
        " V_1.10 { global: later; } V_1.2;"
    )

    def real(self, directory: Path) -> Path:
        (directory / "versions").write_text(self.VERSIONS)
        (directory / "libreal.so.1").write_bytes(
            shared_object(directory, self.SOURCE, f"-Wl,--version-script={directory}/versions")
        )
        return directory / "libreal.so.1"

    def test_a_stub_has_the_versions_of_an_older_library(self, tmp_path: Path) -> None:
        stubs = script("stub_libraries")
        symbols = stubs.dynamic_symbols(self.real(tmp_path))
        for latest, expected in (
            ("1.0", {"kept": "V_1.0", "counter": "V_1.0", "both": "V_1.0"}),
            ("1.9", {"kept": "V_1.0", "counter": "V_1.0", "both": "V_1.2"}),
            ("1.10", {"kept": "V_1.0", "counter": "V_1.0", "both": "V_1.2", "later": "V_1.10"}),
        ):
            stub = tmp_path / latest / "libreal.so.1"
            stubs.build(stub, stubs.up_to(symbols, {"V": latest}), Path(shutil.which("cc")))
            offered = {s.name: s for s in stubs.dynamic_symbols(stub) if s.is_defined}
            assert {name: symbol.version for name, symbol in offered.items()} == expected
            assert [name for name, symbol in offered.items() if symbol.is_thread_local] == ["counter"]

    def test_what_is_linked_against_a_stub_runs_with_the_real_library(self, tmp_path: Path) -> None:
        stubs = script("stub_libraries")
        real = self.real(tmp_path)
        stub = tmp_path / "stub" / "libreal.so.1"
        stubs.build(stub, stubs.up_to(stubs.dynamic_symbols(real), {"V": "1.0"}), Path(shutil.which("cc")))
        (tmp_path / "main.c").write_text(
            "void kept(void); void both(void); int main(void) { kept(); both(); return 0; }"
        )
        run("cc", "-o", tmp_path / "main", tmp_path / "main.c", stub)
        run(tmp_path / "main", LD_LIBRARY_PATH=str(tmp_path))
        asked = {s.name: s.version for s in stubs.dynamic_symbols(tmp_path / "main") if not s.is_defined}
        assert asked["both"] == "V_1.0"


def test_what_is_missing_to_build_wheels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, headers = script("cross_compiler"), script("headers")
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    with pytest.raises(compiler.MissingToolError) as missing:
        compiler.check("aarch64")
    for command in ("pip install ziglang", "apt-get install g++-aarch64-linux-gnu", "apt-get install binutils"):
        assert command in str(missing.value)
    with pytest.raises(headers.WrongHeadersError, match=r"headers\.py --headers .* --torch 2\.14\.0"):
        headers.torch_headers(tmp_path, "2.14")
    with pytest.raises(headers.WrongHeadersError, match=r"headers\.py --headers .* --python python3\.12"):
        headers.python_headers(tmp_path, "3.12")


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_modules_in_use_ask_for_nothing_of_this_machine() -> None:
    require_native()
    check = script("check_wheel")
    modules = list(Path(importlib.import_module("statedict_io").__file__).parent.glob("_*.so"))
    assert modules
    for module in modules:
        content = module.read_bytes()
        assert check.problems_of_module(module.name.partition(".")[0], content) == []
        assert (2, 14) <= check.glibc_level(content) < (3, 0)
