"""The arrows of docs/architecture.md point down only: includes of csrc/, imports of statedict_io."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LAYERS = {
    "core": {"boundary", "pipeline", "archive", "file", "checksum", "pickle"},
    "torch": {"boundary"},
    "boundary": set(),
    "pipeline": {"archive", "file", "checksum"},
    "archive": {"checksum"},
    "file": set(),
    "checksum": set(),
    "pickle": set(),
}
SEE_PYTHON = {"core", "torch", "boundary"}
SEE_TORCH = {"torch"}
PYTHON_HEADER = re.compile(r"^(pybind11|Python\.h|structmember)")
TORCH_HEADER = re.compile(r"^(torch|c10|ATen|aten|caffe2|cuda)/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)


def sources():
    return sorted(
        path for suffix in ("*.h", "*.cpp", "*.hpp", "*.cc", "*.inc") for path in (ROOT / "csrc").rglob(suffix)
    )


def includes_of(path):
    return INCLUDE.findall(path.read_text())


def layer_of_include(path, include):
    """The layer that an include of a project header leads to, or None for a system header."""
    if (ROOT / "csrc" / include).exists():
        return include.split("/")[0]
    if (path.parent / include).exists():
        return (path.parent / include).resolve().relative_to(ROOT / "csrc").parts[0]
    return None


def test_each_directory_of_csrc_is_a_layer_that_the_architecture_names():
    found = {path.relative_to(ROOT / "csrc").parts[0] for path in sources()}
    assert found, "no C++ sources: the other tests here compare nothing"
    assert found <= set(LAYERS)
    text = ARCHITECTURE.read_text()
    assert [layer for layer in sorted(found) if not re.search(rf"^  {layer}/ ", text, re.M)] == []


def test_the_table_of_layers_has_no_cycle():
    for layer, below in LAYERS.items():
        for other in below:
            assert layer not in LAYERS[other]


def test_includes_point_down():
    wrong = []
    for path in sources():
        layer = path.relative_to(ROOT / "csrc").parts[0]
        for include in includes_of(path):
            other = layer_of_include(path, include)
            if other is not None and other != layer and other not in LAYERS.get(layer, set()):
                wrong.append(f"{path.relative_to(ROOT)} includes {include}")
    assert wrong == []


@pytest.mark.parametrize(("header", "seen_by"), [(PYTHON_HEADER, SEE_PYTHON), (TORCH_HEADER, SEE_TORCH)])
def test_only_the_modules_see_python_and_only_one_sees_torch(header, seen_by):
    wrong = [
        f"{path.relative_to(ROOT)} includes {include}"
        for path in sources()
        if path.relative_to(ROOT / "csrc").parts[0] not in seen_by
        for include in includes_of(path)
        if header.match(include)
    ]
    assert wrong == []


def test_project_headers_are_found_where_they_are_named():
    missing = [
        f"{path.relative_to(ROOT)}: {include}"
        for path in sources()
        for include in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
        if layer_of_include(path, include) is None
    ]
    assert missing == []


def modules():
    """name -> path, of every Python module of the package; a package's ``__init__`` has the package's name."""
    package = ROOT / "statedict_io"
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


def cycles(below):
    """Those of ``below`` (name -> names) that lead into a cycle: what is left when all that leads nowhere has been
    taken away, again and again."""
    left = {name: set(others) & below.keys() for name, others in below.items()}
    while leaves := {name for name, others in left.items() if not others}:
        left = {name: others - leaves for name, others in left.items() if name not in leaves}
    return left


def imports_of_all():
    known = {*modules(), "_core"}
    return {name: set(imports_of(name, path, known)) - {name} for name, path in modules().items()}


def test_no_module_imports_itself_by_way_of_others():
    assert cycles(imports_of_all()) == {}


def test_a_cycle_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == {}
    assert set(cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}, "e": set()})) == {"a", "b", "c", "d"}


def test_imports_are_seen_however_they_are_written():
    found = imports_of_all()
    assert {"backends", "backends.protocol", "errors", "writing.targets", "version"} <= set().union(*found.values())
    assert {"writing.pending", "backends", "writing.targets"} <= found["writing.saving"]
    assert "writing.stock_saves" in found["writing.saving"], "an import inside a function"
    assert "errors" in found["backends"] and "writing.saving" in found["__init__"]


def names_spelled(path):
    """Strings that could be the name of a module in this package."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return {value.rpartition(".")[2] for value in constants if isinstance(value, str)}


def test_only_one_module_loads_compiled_code():
    compiled = {"_core"}
    known = {*modules(), *compiled}
    assert [name for name, path in modules().items() if compiled & set(imports_of(name, path, known))] == []
    assert {name for name, path in modules().items() if compiled & names_spelled(path)} == {"backends.extension"}
