"""``torch.load = sio.load`` and ``torch.save = sio.save`` in every form, a process of its own for each."""

import pathlib
import re

import pytest
import warm_process
from corpus import CORPUS

FORMS = {
    "plainly": "torch.save, torch.load = sio.save, sio.load",
    "torch": "torch.save, torch.load = save, load",
    "serialization": "torch.serialization.save, torch.serialization.load = save, load",
    "both": "torch.save = torch.serialization.save = save; torch.load = torch.serialization.load = load",
    "lambda": "torch.save = lambda *a, **k: save(*a, **k); torch.load = lambda *a, **k: load(*a, **k)",
}
#: A function without options chooses the backend itself.
WAYS = [(form, backend) for form in FORMS for backend in ("native", "torch") if (form, backend) != ("plainly", "torch")]
#: With the first save and load of a process, and with later ones: those in every run in two of the forms.
FIRST_AND_LATER = [
    *((*way, False) for way in WAYS),
    *(pytest.param(*way, True, marks=[] if way[0] in ("plainly", "both") else pytest.mark.long) for way in WAYS),
]
PROGRAM = """
import copy, functools, io, pathlib, pickle, sys, tempfile
sys.path.insert(0, {tests!r})
import torch
import statedict_io as sio
original_save, original_load = torch.save, torch.load
save = functools.partial(sio.save, backend={backend!r})
load = functools.partial(sio.load, backend={backend!r})
folder = pathlib.Path(tempfile.mkdtemp())
if {used}:
    save([1], folder / "used.pt"), load(folder / "used.pt")
{swap}
swapped = [(m.save, m.load) for m in (torch, torch.serialization) if m.load is not original_load]
assert swapped
for torch_save, torch_load in swapped:
    state = {{"a": torch.arange(5.0), "b": [torch.ones(2, dtype=torch.int8)]}}
    for options in ({{}}, {{"_use_new_zipfile_serialization": False}}):
        for target in (folder / "x.pt", io.BytesIO()):
            torch_save(state, target, **options)
            for load_options in ({{}}, {{"weights_only": False}}, {{"map_location": "cpu"}}):
                if isinstance(target, io.BytesIO):
                    target.seek(0)
                found = torch_load(target, **load_options)
                assert torch.equal(found["a"], state["a"]) and torch.equal(found["b"][0], state["b"][0])
    torch_save(state, folder / "x.pt")
    assert torch.equal(torch_load(folder / "x.pt", mmap=True)["a"], state["a"])
    assert torch.equal(torch_load(folder / "x.pt", "cpu", pickle, weights_only=False)["a"], state["a"])
    # torch pickles a storage outside of torch.save by calling torch.save, and loads it by torch.load.
    assert torch.equal(pickle.loads(pickle.dumps(state))["a"], state["a"])
    assert copy.deepcopy(state["a"].untyped_storage()).tolist() == state["a"].untyped_storage().tolist()
    for frozen in pathlib.Path({tests!r}, "frozen").glob("*.pt"):
        torch_load(frozen, weights_only=False)
print("all of it")
"""


@pytest.mark.parametrize(("form", "backend", "used"), FIRST_AND_LATER, indirect=["backend"])
def test_everything_works_through_the_swapped_names(form, used, backend, tmp_path):
    tests = str(pathlib.Path(__file__).parent)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=tests, swap=FORMS[form], used=used, backend=backend))
    done = warm_process.run(program, timeout=300)
    assert done.stdout.endswith("all of it\n"), done.stderr[-2000:]


def corpus_through(form, backend, tmp_path, *names):
    program = pathlib.Path(__file__).parent / "swapped_corpus_process.py"
    imported = ("corpus", "equality", "oracle", "statedict_io")
    done = warm_process.run(program, FORMS[form], backend, tmp_path, *names, timeout=1800, imported=imported)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in re.findall(r"(\d+) saved, (\d+) refused", done.stdout)[0]]


@pytest.mark.parametrize(("form", "backend"), WAYS, indirect=["backend"])
def test_the_corpus_through_the_swapped_names(form, backend, tmp_path, request):
    """The first save and the first load of the process are made through them, and all others."""
    names = list(CORPUS)
    if not request.config.getoption("--long"):
        # The forms bind the same functions: each takes its share of the corpus, and together all of it.
        forms = [each for each, of in WAYS if of == backend]
        names = names[forms.index(form) :: len(forms)]
    num_saved, num_refused = corpus_through(form, backend, tmp_path, *names)
    assert num_saved + num_refused == len(names)
    assert num_saved > len(names) * 2 // 3


@pytest.mark.long
@pytest.mark.parametrize("name", CORPUS)
def test_each_object_is_the_first_of_a_process(name, backend, tmp_path):
    assert sum(corpus_through("both", backend, tmp_path, name)) == 1
