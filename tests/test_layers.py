"""The arrows of docs/architecture.md point down only: includes of csrc/, imports of statedict_io.

A folder is a room. A new file needs no entry here; a new room needs a line in its table, and one in the architecture.
"""

import ast
import functools
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "statedict_io"


# What the files of a room may include or import besides each other.
INCLUDES = {
    "core": "archive boundary checksum file pickle pipeline/memory pipeline/read pipeline/threads pipeline/write",
    "torch": "boundary",
    "boundary": "",
    "pipeline/write": "archive checksum file pipeline/memory pipeline/threads",
    "pipeline/read": "archive checksum file pipeline/memory pipeline/threads",
    "pipeline/threads": "pipeline/memory",
    "pipeline/memory": "",
    "archive": "checksum",
    "file": "",
    "checksum": "",
    "pickle": "",
}
SEE_PYTHON = {"core", "torch", "boundary"}
SEE_TORCH = {"torch"}
PYTHON_HEADER = re.compile(r"^(pybind11|Python\.h|structmember)")
TORCH_HEADER = re.compile(r"^(torch|c10|ATen|aten|caffe2|cuda)/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)

# A module of the top level is a room of its own.
IMPORTS = {
    "__main__": "backends commands errors untrusted version",
    "__init__": "backends checkpoints errors reading reading/lazy version writing",
    "commands": "checkpoints conversion dcp errors installed progress reading reading/lazy remote system untrusted"
    " writing",
    "integrations": "reading writing",
    "checkpoints": "dcp errors options reading remote system writing",
    "dcp": "archive backends errors installed names options pickles progress reading reading/lazy remote system"
    " untrusted writing",
    "conversion": "backends errors formats installed options pickles progress reading reading/lazy system untrusted"
    " writing",
    "reading/lazy": "archive errors formats installed names options pickles progress reading remote untrusted",
    "reading": "archive backends errors formats installed names options pickles progress remote system untrusted",
    "writing": "backends errors formats installed options pickles progress remote system untrusted",
    "backends": "archive errors installed options pickles progress system",
    "names": "errors pickles untrusted",
    "pickles": "errors installed system untrusted",
    "formats": "errors untrusted",
    "archive": "installed",
    "remote": "archive backends errors progress system",
    "progress": "untrusted",
    "untrusted": "errors",
    "options": "",
    "installed": "",
    "system": "",
    "errors": "",
    "version": "",
}


def against(arrows, found):
    """Those of ``found`` (room, other room, how) that ``arrows`` (room -> rooms) do not have."""
    return sorted(how for room, other, how in found if other not in {room, *arrows.get(room, "").split()})


def cycles(below):
    """Those of ``below`` (name -> names) that lead into a cycle: what is left when all that leads nowhere has been
    taken away, again and again."""
    left = {name: set(others) & below.keys() for name, others in below.items()}
    while leaves := {name for name, others in left.items() if not others}:
        left = {name: others - leaves for name, others in left.items() if name not in leaves}
    return left


def named_in_architecture(top):
    """The folders and top-level modules in its list below ``top``, with those inside each other as paths."""
    lines = ARCHITECTURE.read_text().partition(f"\n{top}/\n")[2].splitlines()
    found, outer = set(), ""
    for line in itertools.takewhile(lambda line: line.startswith("  ") or not line, lines):
        if match := re.match(r"( +)([\w/]+?)/? ", line):
            is_inner = len(match[1]) > 2
            outer = outer if is_inner else match[2]
            found.add(f"{outer}/{match[2]}" if is_inner else match[2])
    return found


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == {}
    assert set(cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}, "e": set()})) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("arrows", [INCLUDES, IMPORTS], ids=["includes", "imports"])
def test_the_arrows_have_no_cycle_and_lead_to_rooms(arrows):
    below = {room: set(others.split()) for room, others in arrows.items()}
    assert cycles(below) == {}
    assert set().union(*below.values()) <= below.keys()


def sources():
    return sorted(path for suffix in ("*.h", "*.cpp", "*.hpp", "*.cc", "*.inc") for path in CSRC.rglob(suffix))


def includes_of(path):
    return INCLUDE.findall(path.read_text())


def room_of_source(path):
    return path.relative_to(CSRC).parent.as_posix()


def room_of_include(path, include):
    """The room that an include of a project header leads to, or None for a system header."""
    for directory in (CSRC, path.parent):
        if (directory / include).exists():
            return room_of_source((directory / include).resolve())
    return None


def test_each_directory_of_csrc_is_a_room_that_the_architecture_names():
    found = {room_of_source(path) for path in sources()}
    assert found == INCLUDES.keys()
    assert found == named_in_architecture("csrc") - {"pipeline"}


def test_includes_point_down():
    found = [
        (room_of_source(path), other, f"{path.relative_to(ROOT)} includes {include}")
        for path in sources()
        for include in includes_of(path)
        if (other := room_of_include(path, include)) is not None
    ]
    assert len(found) > 100
    assert against(INCLUDES, found) == []


@pytest.mark.parametrize(("header", "seen_by"), [(PYTHON_HEADER, SEE_PYTHON), (TORCH_HEADER, SEE_TORCH)])
def test_only_the_modules_see_python_and_only_one_sees_torch(header, seen_by):
    wrong = [
        f"{path.relative_to(ROOT)} includes {include}"
        for path in sources()
        if room_of_source(path) not in seen_by
        for include in includes_of(path)
        if header.match(include)
    ]
    assert wrong == []


def test_project_headers_are_found_where_they_are_named():
    missing = [
        f"{path.relative_to(ROOT)}: {include}"
        for path in sources()
        for include in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
        if room_of_include(path, include) is None
    ]
    assert missing == []


def modules(package=PACKAGE):
    """name -> path, of every Python module of the package; a package's ``__init__`` has the package's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


def imports_of(name, path, known):
    """The modules of statedict_io that a module imports, anywhere in its text."""
    package = ["statedict_io", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    elif name == "__init__":
        package = ["statedict_io"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            targets = [node.args[0].value]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "statedict_io":
                inner = target.removeprefix("statedict_io").removeprefix(".")
                while inner and inner not in known:
                    inner = inner.rpartition(".")[0]
                yield inner or "__init__"


@functools.cache
def imports_of_all(package=PACKAGE):
    known = {*modules(package), "_core"}
    return {name: set(imports_of(name, path, known)) - {name} for name, path in modules(package).items()}


def arrows_of(package=PACKAGE):
    rooms = rooms_of_modules(package)
    return [
        (rooms[name], rooms[other], f"{name} imports {other}")
        for name, others in imports_of_all(package).items()
        for other in others
    ]


def rooms_of_modules(package=PACKAGE):
    places = {name: path.relative_to(package) for name, path in modules(package).items()}
    return {name: at.parent.as_posix() if len(at.parts) > 1 else at.stem for name, at in places.items()}


def test_each_folder_is_a_room_that_the_architecture_names_and_that_says_what_it_holds():
    rooms = set(rooms_of_modules().values())
    assert rooms == IMPORTS.keys()
    assert rooms == named_in_architecture("statedict_io")
    packages = [path for path in modules().values() if path.name == "__init__.py"]
    assert [path for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_imports_point_down():
    assert against(IMPORTS, arrows_of()) == []


def test_no_module_imports_itself_by_way_of_others():
    assert cycles(imports_of_all()) == {}


@pytest.mark.parametrize(
    ("sources", "upward", "in_cycles"),
    [
        ({"low/a": "", "low/b": "from .a import f", "high/c": "from ..low import a\nfrom ..low.b import g"}, [], set()),
        ({"low/a": "from ..high.c import g", "high/c": ""}, ["low.a imports high.c"], set()),
        ({"low/a": "def f():\n    from ..high import c", "high/c": ""}, ["low.a imports high.c"], set()),
        ({"low/a": "import statedict_io.high.c", "high/c": ""}, ["low.a imports high.c"], set()),
        ({"low/a": "from .. import high", "high/c": ""}, ["low.a imports high"], set()),
        ({"low/a": "from .b import f", "low/b": "if True:\n    from . import a", "high/c": ""}, [], {"low.a", "low.b"}),
    ],
)
def test_what_points_up_or_back_is_found(sources, upward, in_cycles, tmp_path):
    package = tmp_path / "statedict_io"
    for room in ("low", "high"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text)
    assert against({"high": "low", "low": ""}, arrows_of(package)) == upward
    assert cycles(imports_of_all(package)).keys() == in_cycles


def names_spelled(path):
    """Strings that could be the name of a module in this package."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return {value.rpartition(".")[2] for value in constants if isinstance(value, str)}


def test_only_one_module_loads_compiled_code():
    compiled = {"_core"}
    assert [name for name, others in imports_of_all().items() if compiled & others] == []
    assert {name for name, path in modules().items() if compiled & names_spelled(path)} == {"backends.extension"}
