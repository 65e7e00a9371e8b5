"""``patch_torch``: what torch.save does then, to whom it reaches, what it leaves alone, and how it is undone."""

import functools
import io
import itertools
import os
import pathlib
import pickle
import stat
import threading

import pytest
import torch
import warm_process
from oracle import assert_same_bytes
from patched_saves import ORIGINAL, is_replaced_by, nothing_stays_patched, sample_state  # noqa: F401 - a fixture

import statedict_io as sio

PROCESS = pathlib.Path(__file__).with_name("patching_process.py")


@pytest.fixture
def state():
    return sample_state()


class Options:
    """What reaches ``statedict_io.save``'s parts."""

    def __init__(self, monkeypatch):
        self.plans, self.writes = [], []
        plan, write = sio.writing.saving.plan, sio.writing.saving.write_planned
        monkeypatch.setattr(sio.writing.saving, "plan", lambda *a, **k: self.plans.append(k) or plan(*a, **k))
        monkeypatch.setattr(sio.writing.saving, "write_planned", lambda p, **k: self.writes.append(k) or write(p, **k))


def test_as_a_function_and_as_a_context_manager(tmp_path, state, backend):
    patch = sio.patch_torch(backend=backend)
    try:
        assert patch.active and torch.save is not ORIGINAL and torch.serialization.save is torch.save
        assert is_replaced_by(torch.save, state, tmp_path / "a.pt")
    finally:
        patch.undo()
    assert not patch.active and torch.save is ORIGINAL and torch.serialization.save is ORIGINAL
    patch.undo()
    with pytest.raises(RuntimeError, match="undone"), patch:
        pass
    assert not is_replaced_by(torch.save, state, tmp_path / "a.pt")
    with sio.patch_torch(backend=backend) as patch:
        assert is_replaced_by(torch.save, state, tmp_path / "b.pt")
    assert torch.save is ORIGINAL
    with pytest.raises(KeyError), sio.patch_torch(backend=backend):
        raise KeyError
    assert torch.save is ORIGINAL


def test_writes_the_bytes_of_the_original(tmp_path, state, backend):
    (tmp_path / "ref").mkdir(), (tmp_path / "ours").mkdir()
    for name, options in {
        "zip.pt": {},
        "protocol.pt": {"pickle_protocol": 4},
        "legacy.pt": {"_use_new_zipfile_serialization": False},
        "no_byteorder.pt": {"_disable_byteorder_record": True},
    }.items():
        torch.save(state, tmp_path / "ref" / name, **options)
        with sio.patch_torch(backend=backend):
            assert is_replaced_by(functools.partial(torch.save, **options), state, tmp_path / "ours" / name)
        assert_same_bytes(tmp_path / "ref" / name, tmp_path / "ours" / name)
    ref, ours = io.BytesIO(), io.BytesIO()
    torch.save(state, ref)
    with sio.patch_torch(backend=backend):
        torch.save(f=ours, obj=state)
    assert ref.getvalue() == ours.getvalue()


def test_options_are_passed_through(tmp_path, state, monkeypatch):
    seen = Options(monkeypatch)
    progress = []
    with sio.patch_torch(durable=False, backend="torch", progress=lambda *done: progress.append(done)):
        torch.save(state, tmp_path / "a.pt")
    assert seen.plans[0]["backend"] == "torch" and seen.writes[0]["durable"] is False
    assert progress[-1][0] == progress[-1][1] > 0
    with sio.patch_torch():
        torch.save(state, tmp_path / "a.pt")
    assert seen.plans[1]["backend"] == "auto" and seen.writes[1]["durable"] is True


def test_wrong_options_are_refused_before_anything_is_patched():
    for options in ({"backend": "quick"}, {"progress": "yes"}):
        with pytest.raises((ValueError, TypeError)):
            sio.patch_torch(**options)
        assert torch.save is ORIGINAL


def test_who_imports_later_gets_the_patched_one_and_who_did_before_the_original(tmp_path, state):
    from torch import save as before

    with sio.patch_torch():
        from torch import save as later
        from torch.serialization import save as later_too

        assert is_replaced_by(later, state, tmp_path / "a.pt")
        assert is_replaced_by(later_too, state, tmp_path / "a.pt")
        assert not is_replaced_by(before, state, tmp_path / "a.pt")
        # By reference, as a job for another process is.
        assert pickle.loads(pickle.dumps(later)) is later
    assert not is_replaced_by(later, state, tmp_path / "a.pt")


def test_looks_like_the_original():
    import inspect

    with sio.patch_torch():
        assert inspect.signature(torch.save) == inspect.signature(ORIGINAL)
        assert torch.save.__doc__ == ORIGINAL.__doc__ and torch.save.__name__ == "save"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_patches_are_undone_in_any_order(tmp_path, state, monkeypatch, order):
    seen = Options(monkeypatch)
    durable = [True, False, True]
    patches = [sio.patch_torch(durable=flush) for flush in durable]
    left = list(range(3))
    for number in order:
        torch.save(state, tmp_path / "a.pt")
        assert seen.writes[-1]["durable"] is durable[max(left)]
        patches[number].undo()
        left.remove(number)
    assert torch.save is ORIGINAL
    assert len(seen.writes) == 3  # once a save, however many patches there were


class Someone:
    """Another who binds torch.save, as unittest.mock or a storage library does; without a hash."""

    __hash__ = None

    def __init__(self):
        self.calls = 0

    def bind(self):
        self.before, torch.save = torch.save, self

    def unbind(self):
        torch.save = self.before

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.before(*args, **kwargs)


STEPS = {
    "theirs, then ours, undone in turn": "bind patch save undo unbind",
    "theirs, then ours, theirs undone first": "bind patch unbind undo",
    "ours, then theirs, undone in turn": "patch bind save unbind save undo",
    "ours, then theirs, ours undone first": "patch bind undo plain unbind plain",
    "ours around theirs": "patch bind patch save undo save undo plain unbind plain",
    "ours again over what is left of ours": "patch bind undo unbind patch save undo",
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_others_who_bind_torch_save_too(tmp_path, state, steps):
    someone, patches = Someone(), []
    for step in steps.split():
        if step == "patch":
            patches.append(sio.patch_torch())
        elif step == "undo":
            top = torch.save
            patches.pop().undo()
            if top is someone:
                assert torch.save is someone
        elif step in ("save", "plain"):
            assert is_replaced_by(torch.save, state, tmp_path / "a.pt") == (step == "save")
        else:
            getattr(someone, step)()
    assert not is_replaced_by(torch.save, state, tmp_path / "a.pt")
    sio.patch_torch().undo()  # also of what somebody had bound over and has put back
    assert torch.save is ORIGINAL


def test_what_is_not_taken_goes_to_who_was_there_before(tmp_path, state):
    someone = Someone()
    someone.bind()
    try:
        with sio.patch_torch():
            torch.save(state, tmp_path / "a.pt")
            assert someone.calls == 0
            torch.save(state, io.BytesIO(), _use_new_zipfile_serialization=False)
            assert someone.calls == 1
            with pytest.raises(TypeError, match="compression"):  # of a later torch, perhaps
                torch.save(state, tmp_path / "b.pt", compression="zstd")
            with pytest.raises(TypeError, match="missing 1 required positional argument: 'f'"):
                torch.save(state)
            assert someone.calls == 3
    finally:
        someone.unbind()
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_library_writes_with_the_original_while_patched(tmp_path, state, monkeypatch):
    """On a torch whose format neither backend reproduces, the patched torch.save must not call itself."""
    with sio.patch_torch():
        monkeypatch.setattr(sio.writing.saving.backends, "choose", lambda wish: None)
        torch.save(state, tmp_path / "a.pt")
        torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        sio.save(state, tmp_path / "b.pt")
    monkeypatch.undo()
    assert stat.S_ISREG((tmp_path / "a.pt").stat().st_mode)
    assert len({torch.load(tmp_path / name)["step"] for name in ("a.pt", "b.pt", "legacy.pt")}) == 1


def test_threads_that_save_while_others_patch_and_undo(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    expected = (tmp_path / "model.pt").read_bytes()
    errors, stop = [], threading.Event()

    def guarded(function):
        def run(*arguments):
            try:
                function(*arguments)
            except BaseException as e:
                errors.append(e)

        return run

    @guarded
    def save(number):
        directory = tmp_path / str(number)
        directory.mkdir()
        while not stop.is_set():
            torch.save(state, directory / "model.pt")
            assert (directory / "model.pt").read_bytes() == expected

    @guarded
    def patch():
        for _ in range(100):
            with sio.patch_torch(durable=False):
                assert torch.save is not ORIGINAL

    savers = [threading.Thread(target=save, args=(number,)) for number in range(2)]
    patchers = [threading.Thread(target=patch) for _ in range(3)]
    for thread in savers + patchers:
        thread.start()
    for thread in patchers:
        thread.join()
    stop.set()
    for thread in savers:
        thread.join()
    assert errors == []
    assert torch.save is ORIGINAL


def test_overlapping_patches_leave_nothing_behind(tmp_path, state):
    """Patches that never nest, in a job that patches around each step of several threads."""
    patch = sio.patch_torch()
    for _ in range(2000):  # more than calls may be nested
        patch, before = sio.patch_torch(), patch
        before.undo()
    assert is_replaced_by(torch.save, state, tmp_path / "a.pt")
    assert torch.save.__wrapped__ is ORIGINAL
    patch.undo()
    assert torch.save is ORIGINAL


def test_somebody_who_binds_again_and_again(tmp_path, state):
    someone = Someone()
    for _ in range(2000):
        patch = sio.patch_torch()
        someone.bind()
        patch.undo()
        someone.unbind()
    torch.save(state, tmp_path / "a.pt")
    sio.patch_torch().undo()
    assert torch.save is ORIGINAL


@pytest.mark.parametrize("scenario", ["fork", "spawn", "lock_held_at_fork", "ddp", "interpreter_exit"])
def test_other_processes(tmp_path, scenario):
    ended = warm_process.run(PROCESS, scenario, tmp_path, timeout=120)
    assert ended.returncode == 0, ended.stderr
    names = sorted(path.name for path in (tmp_path / "ref").iterdir())
    assert names and names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert_same_bytes(tmp_path / "ref" / name, tmp_path / "ours" / name)
