"""Finding: the newest sound checkpoint, whatever lies on top of it."""

import errno
import json
import os
import pathlib
import pickle
import shutil
import threading
import warnings
import zipfile

import pytest
import torch

import statedict_io as sio
from statedict_io.__main__ import main
from statedict_io.checkpoints import entry, local_folder, soundness

STEPS = (1, 2, 3, 4)


def flip(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"\x02" * 100) if b"\x02" * 100 in data else len(data) // 2
    data[at + 50] ^= 1
    path.write_bytes(data)


def flip_in_directory(path):
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 20] ^= 1
    path.write_bytes(data)


def replaced_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def zipped(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


DAMAGES = {
    "flip": flip,
    "flip in the directory": flip_in_directory,
    "truncated to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("<html>404</html>"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"step": 9})),
    "legacy": lambda path: torch.save({"step": 9}, path, _use_new_zipfile_serialization=False),
    "another zip": lambda path: zipped(path, {"notes.txt": b"no checkpoint"}),
    "TorchScript": lambda path: zipped(path, {"x/data.pkl": b"", "x/constants.pkl": b"", "x/code/a.py": b""}),
    "directory": replaced_by(lambda path: path.mkdir()),
    "link that leads nowhere": replaced_by(lambda path: path.symlink_to("nowhere")),
    "link in a circle": replaced_by(lambda path: path.symlink_to(path.name)),
    "fifo": replaced_by(os.mkfifo),
    "link to a fifo": replaced_by(lambda path: (os.mkfifo(str(path) + ".fifo"), path.symlink_to(str(path) + ".fifo"))),
    "unreadable": lambda path: path.chmod(0),
}
#: what a look at the ends of the file cannot find
IN_THE_MIDDLE = {"flip"}


@pytest.fixture
def run(tmp_path, backend, state):
    ckpts = sio.CheckpointDirectory(tmp_path / "run", best="min")
    for step in STEPS:
        ckpts.save(state(step), step, metric=1 / step, backend=backend)
    ckpts.close()
    return tmp_path / "run"


def path_of(run, step):
    return run / f"step-{step:08d}.pt"


@pytest.mark.parametrize("verify", ["crc", "structure"])
@pytest.mark.parametrize("num_damaged", [1, 3, 4])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_passed_over_and_named(run, damage, num_damaged, verify, backend):
    if damage == "unreadable" and (os.geteuid() == 0 or num_damaged == len(STEPS)):
        pytest.skip("root reads everything; where nothing can be read there is no answer: see test_faults.py")
    if damage in IN_THE_MIDDLE and verify == "structure":
        pytest.skip("is not found by this")
    damaged = STEPS[::-1][:num_damaged]
    for step in damaged:
        DAMAGES[damage](path_of(run, step))
    before = listing(run)
    for search in ("latest", "best", "restore"):
        ckpts = sio.CheckpointDirectory(run, best="min")
        model = Part()
        with pytest.warns(sio.CheckpointDirectoryWarning) as warned:
            if search == "restore":
                found = ckpts.restore(weight=model, verify=verify, backend=backend)
            else:
                found = getattr(ckpts, search)(verify=verify, backend=backend)
        (message,) = [str(warning.message) for warning in warned]
        assert all(str(path_of(run, step)) in message for step in damaged)
        if num_damaged == len(STEPS):
            assert found is None and model.loaded is None and "no sound one" in message
        elif search == "restore":
            assert found == len(STEPS) - num_damaged and model.loaded[0] == found
        else:
            assert found.step == len(STEPS) - num_damaged
            assert [(each.step, each.path) for each in found.skipped] == [
                (step, str(path_of(run, step))) for step in damaged
            ]
            assert all(each.path in each.reason for each in found.skipped)
    assert listing(run) == before


def listing(run):
    return sorted((p.name, p.lstat().st_mtime_ns) for p in run.iterdir())


class Part:
    loaded = None

    def load_state_dict(self, state):
        self.loaded = state


def flip_what_no_crc_covers(path, backend):
    """A byte of the padding before a tensor."""
    data = bytearray(path.read_bytes())
    at = data.index(b"ZZZZ")
    data[at] ^= 1
    path.write_bytes(data)
    assert sio.verify(path, backend=backend).ok and sio.load(path, verify=True, backend=backend)["step"] == 4


def copy_an_older_one(path, backend):
    """As sound as can be, and not what was saved."""
    shutil.copy(path_of(path.parent, 3), path)


@pytest.mark.parametrize("damage", [flip_what_no_crc_covers, copy_an_older_one])
def test_what_only_a_digest_tells(tmp_path, backend, state, damage, capsys):
    ckpts = sio.CheckpointDirectory(tmp_path, best="max")
    for step in STEPS:
        ckpts.save(state(step), step, step, backend=backend, digest="sha256")
    assert ckpts.latest(verify="digest", backend=backend).step == 4
    damage(path_of(tmp_path, 4), backend)
    assert sio.CheckpointDirectory(tmp_path).latest(backend=backend).step == 4
    told = r"step-00000004\.pt: these are not the bytes that were saved"
    model = Part()
    for search in (
        lambda: ckpts.latest(verify="digest", backend=backend).step,
        lambda: ckpts.best(verify="digest", backend=backend).step,
        lambda: ckpts.restore(verify="digest", backend=backend, weight=model),
    ):
        with pytest.warns(sio.CheckpointDirectoryWarning, match=told):
            assert search() == 3
    assert model.loaded[0] == 3
    with pytest.raises(sio.CorruptCheckpointError, match=told):
        ckpts.restore(step=4, verify="digest", backend=backend)
    problems = [each.problem(verify="digest", backend=backend) for each in ckpts]
    assert problems[:3] == [None] * 3 and "00000004.pt.json has" in problems[3]
    assert main(["list", str(tmp_path), "--verify", "crc"]) == 0
    assert main(["list", str(tmp_path), "--verify", "digest"]) == 1
    rows = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith(".pt")]
    assert rows[-1] == ["no", "step-00000004.pt"] and rows[-2] == ["yes", "step-00000003.pt"]


def test_a_digest_is_compared_where_one_is_noted_and_of_the_file_that_is_there(run, state, backend):
    """Not that of a file that has been replaced, or is being replaced."""
    ckpts = sio.CheckpointDirectory(run)
    assert ckpts.latest(verify="digest", backend=backend).step == 4
    ckpts.save(state(4), 4, digest="sha256", backend=backend)
    noted = ckpts.latest(verify="digest").sha256
    ckpts._writer.announce(4, None, durable=True)  # by a process that is killed then
    assert ckpts.latest(verify="digest").sha256 == noted
    flip(path_of(run, 3))
    ckpts.save({"another": "state"}, 4, backend=backend)
    assert ckpts.latest(verify="digest").sha256 is None
    assert "data/0" in next(each for each in ckpts if each.step == 3).problem(verify="digest")  # CRCs as well


def test_a_file_that_is_replaced_while_its_digest_is_made(run, state, monkeypatch):
    ckpts = sio.CheckpointDirectory(run)
    ckpts.save(state(4), 4, digest="sha256")
    real, again = soundness.digest_of, [True]

    def digest_of(folder, name):
        if again and threading.current_thread() is threading.main_thread():
            again.pop()
            ckpts.save({"saved": "again"}, 4, digest="sha256")
        return real(folder, name)

    monkeypatch.setattr(soundness, "digest_of", digest_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpts.latest(verify="digest").load() == {"saved": "again"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_is_not_known_to_be_damaged(tmp_path, number, state, monkeypatch):
    """A disk or a mount may have been away for a moment: the best one stays."""
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1, keep_best=1, best="min")
    for step, metric in [(1, 0.1), (2, 0.2)]:
        ckpts.save(state(step), step, metric)
    real = os.open

    def fails(path, *arguments, **options):
        if os.path.basename(path) == "step-00000001.pt":
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    with monkeypatch.context() as m:
        m.setattr(os, "open", fails)
        with pytest.warns(sio.CheckpointDirectoryWarning, match=os.strerror(number)):
            assert ckpts.best().step == 2
    for step in (3, 4):
        ckpts.save(state(step), step, 0.3)
    assert [found.step for found in ckpts] == [1, 4]
    assert ckpts.best().step == 1


def test_without_verification_nothing_is_opened(run, monkeypatch):
    for step in STEPS:
        flip(path_of(run, step))
    monkeypatch.setattr(entry, "Lease", None)
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(os, "open", None)
    assert sio.CheckpointDirectory(run).latest(verify=False).step == 4


def test_what_is_damaged_counts_no_more(run, state):
    ckpts = sio.CheckpointDirectory(run, keep_last=2)
    for step in (3, 4):
        flip(path_of(run, step))
    with pytest.warns(sio.CheckpointDirectoryWarning):
        assert ckpts.restore() == 2
    ckpts.save(state(3), 3)
    assert [found.step for found in ckpts] == [2, 3, 4]
    assert ckpts.latest(verify=False).step == 4
    ckpts.save(state(4), 4)
    assert [found.step for found in ckpts] == [3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpts.latest().step == 4


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EINTR])
def test_an_error_that_says_nothing_about_the_checkpoint_is_raised(run, number, monkeypatch):
    """Otherwise a run that has too many files open would go back to an older checkpoint."""

    real = os.open

    def fails(path, *arguments, **options):
        if str(path).endswith("step-00000004.pt"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fails)
    ckpts = sio.CheckpointDirectory(run)
    for search in (ckpts.latest, ckpts.restore):
        with pytest.raises(OSError) as raised:
            search()
        assert raised.value.errno == number


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_directory_that_cannot_be_listed_is_no_empty_one(run, number, monkeypatch):
    def fails(path):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(local_folder.os, "scandir", fails)
    with pytest.raises(OSError) as raised:
        sio.CheckpointDirectory(run).latest()
    assert raised.value.errno == number and raised.value.filename == str(run)


def test_it_goes_on_where_another_process_deletes_and_saves(run, monkeypatch, state):
    """The newest is deleted between the listing and the look at it, time and again."""
    other = sio.CheckpointDirectory(run, keep_last=1)
    real, step = local_folder.LocalFolder.listed, [4]

    def listed(folder):
        found = real(folder)
        if folder.path == str(run) and step[0] < 9 and threading.current_thread().name == "reader":
            step[0] += 1
            saving = threading.Thread(target=lambda: other.save(state(step[0]), step[0]))
            saving.start()
            saving.join()
        return found

    monkeypatch.setattr(local_folder.LocalFolder, "listed", listed)
    results = []

    def read():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(sio.CheckpointDirectory(run).latest())

    reader = threading.Thread(target=read, name="reader")
    reader.start()
    reader.join(60)
    (found,) = results
    assert found.step == 9 and found.skipped == []


def test_facts_of_every_kind_are_no_trouble(run):
    path = path_of(run, 4).with_name("step-00000004.pt.json")
    good = json.loads(path.read_text())
    for content in (
        *(b"", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}', b"null", b"9" * 5000, b" " * (1 << 17)),
        *(json.dumps({**good, "metric": metric}).encode() for metric in ({}, [], True, "x", "9" * 400)),
        json.dumps({**good, "metric": None, "time": "soon", "wall_clock": 5, "sha256": [], "protected": 1}).encode(),
    ):
        path.write_bytes(content)
        ckpts = sio.CheckpointDirectory(run, best="min")
        found = ckpts.latest()
        assert found.step == 4 and found.metric in (None, float("inf")) and not found.protected
        assert ckpts.best().step == 3
    path.unlink()
    os.mkfifo(path)
    assert sio.CheckpointDirectory(run).latest().metric is None


def test_files_that_others_put_there(tmp_path, state):
    """Without facts; the step is that of the name."""
    torch.save(state(7), tmp_path / "step-00000007.pt")
    torch.save(state(8), tmp_path / "other.pt")
    found = sio.CheckpointDirectory(tmp_path).latest()
    assert found.step == 7 and found.metric is found.time is found.sha256 is None
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "step-00000007.pt", tmp_path / "elsewhere" / "7.pt")
    (tmp_path / "step-00000007.pt").symlink_to("elsewhere/7.pt")
    ckpts = sio.CheckpointDirectory(tmp_path, keep_last=1)
    assert ckpts.latest().load()["step"] == 7
    ckpts.save(state(8), 8)
    assert [each.step for each in ckpts] == [8]
    assert (tmp_path / "elsewhere" / "7.pt").exists()  # the link goes, not what it leads to


def test_a_read_only_directory_is_read(run, tmp_path):
    before = listing(run)
    run.chmod(0o555)
    try:
        ckpts = sio.CheckpointDirectory(run, best="min")
        assert ckpts.latest().step == 4 and ckpts.best().step == 4 and ckpts.restore() == 4 and len(list(ckpts)) == 4
    finally:
        run.chmod(0o755)
    assert listing(run) == before


@pytest.mark.parametrize("verify", ["all", None, 2])
def test_a_level_that_is_none(verify, tmp_path):
    with pytest.raises(ValueError, match="verify"):
        sio.CheckpointDirectory(tmp_path).latest(verify=verify)


def test_best_needs_to_know_what_is_best(tmp_path):
    with pytest.raises(ValueError, match="best="):
        sio.CheckpointDirectory(tmp_path).best()


def test_a_thousand_files_are_listed_without_a_look_at_each(tmp_path, monkeypatch):
    for step in range(1000):
        for suffix in (".pt", ".pt.json"):
            pathlib.Path(tmp_path, f"step-{step:08d}{suffix}").touch()
    calls = []
    for name in ("stat", "lstat", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **k: (calls.append(a), real(*a, **k))[1])
    assert sio.CheckpointDirectory(tmp_path).latest(verify=False).step == 999
    assert len(calls) < 20
