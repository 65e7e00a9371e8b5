"""``_core.pyi`` says of the compiled module what pybind11 says of it."""

import ast
import pathlib

import pytest
from conftest import require_native

import statedict_io
from statedict_io.backends import extension

STUB = pathlib.Path(statedict_io.__file__).with_name("_core.pyi")


def parameters_of(function):
    """(name, whether by keyword alone, default) of each; a default is a constant, or () for a sequence."""

    def value(node):
        return None if node is None else ast.unparse(node).replace("[]", "()")

    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    return [(each.arg, False, value(default)) for each, default in zip(positional, defaults, strict=True)] + [
        (each.arg, True, value(default))
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


def of_stub(body):
    """name -> parameters of a function, (bases, members) of a class, or "value"."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            is_value = [ast.unparse(each) for each in node.decorator_list] == ["property"]
            found[node.name] = "value" if is_value else parameters_of(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = ([ast.unparse(base) for base in node.bases], of_stub(node.body))
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = "value"
    return found


def of_module(members):
    """The same of what is there; pybind11 puts a signature into the first line of each docstring."""
    found = {}
    for name, member in members.items():
        if isinstance(member, type):
            inherited = [base.__name__ for base in member.__bases__ if not base.__name__.startswith("pybind11_")]
            found[name] = ([] if inherited == ["object"] else inherited, of_module(vars(member)))
        elif name == "__init__" or not name.startswith("_"):
            signature = (getattr(member, "__doc__", None) or "").partition("\n")[0]
            if signature.startswith(f"{name}("):
                (function,) = ast.parse(f"def {signature.rpartition(' -> ')[0]}: ...").body
                found[name] = parameters_of(function)
            elif name != "__init__":  # else object's: it cannot be called
                found[name] = "value"
    return found


def test_the_stub_is_that_of_the_module():
    require_native()
    core = extension.find().core
    stub, module = of_stub(ast.parse(STUB.read_text()).body), of_module(vars(core))
    assert stub.keys() == module.keys()
    for name, of in module.items():
        assert stub[name] == of, name
    assert len(module["PlannedFile"][1]) > 5 and ("fd", False, None) in module["PlannedFile"][1]["write_fd"]


@pytest.mark.parametrize(
    "mistake",
    [
        ("class Snapshot:", "class Snapshot:\n    def clone_done(self) -> bool: ...\n"),
        ('direct: str = "auto"', 'direct: str = "on"'),
        ("bytes_per_second: float = 0.0,", ""),
        ("verify: bool,", "verify: bool = False,"),
        ("        *,\n        alignment: int", "        alignment: int"),
        ("class CorruptArchive(ValueError)", "class CorruptArchive(RuntimeError)"),
        ("@property\n    def archive_name", "def archive_name"),
        ("def simd()", "def simd_name()"),
    ],
)
def test_that_test_sees(mistake):
    require_native()
    before, after = mistake
    text = STUB.read_text()
    assert before in text
    wrong = of_stub(ast.parse(text.replace(before, after)).body)
    assert wrong != of_module(vars(extension.find().core))
