"""Temporaries of savers that were killed: removed by the next save of the same path once their owner is surely gone."""

import os
import subprocess
import time

import pytest
import torch

import statedict_io as sio
from statedict_io.system import machine
from statedict_io.writing import temporary_names

DAY = 24 * 3600


class Owner:
    """The parts of a temporary's name that say whose it is: those of this process, or as given."""

    def __init__(self, pid=None, start=None, **others):
        parts = temporary_names.owner(os.getpid()).split("-")
        self.host, self.boot, self.namespace, self.pid, self.start = parts
        if pid is not None:
            self.pid, self.start = f"{pid:x}", f"{machine.start_time(pid) if start is None else start:x}"
        elif start is not None:
            self.start = f"{start:x}"
        vars(self).update(others)

    def temporary(self, target="model.pt"):
        owner = "-".join((self.host, self.boot, self.namespace, self.pid, self.start))
        return f"{temporary_names.prefix_of(target)}{owner}.0-0.sdio-tmp"


DEAD = 1 << 23  # past the largest process id that Linux gives out


CASES = {  # (owner, seconds since the last write, whether it is removed)
    "dead process": (lambda: Owner(DEAD, 1), 0, True),
    "its id now is another process's": (lambda: Owner(os.getppid(), 12345), 0, True),
    "this process's id, of an earlier one": (lambda: Owner(start=1), 0, True),
    "living process": (lambda: Owner(os.getppid()), 2 * DAY, False),
    "this process": (lambda: Owner(), 2 * DAY, False),
    "living process of unknown start": (lambda: Owner(os.getppid(), 0), 2 * DAY, False),
    "before this boot": (lambda: Owner(DEAD, 1, boot="00000000"), "boot", True),
    "namesake machine": (lambda: Owner(DEAD, 1, boot="00000000"), 0, False),
    "other machine": (lambda: Owner(DEAD, 1, host="00000000"), DAY - 60, False),
    "other machine, long ago": (lambda: Owner(DEAD, 1, host="00000000"), DAY + 60, True),
    "other container": (lambda: Owner(DEAD, 1, namespace="1"), 0, False),
    "other container, long ago": (lambda: Owner(DEAD, 1, namespace="1"), DAY + 60, True),
}


@pytest.mark.parametrize("as_directory", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_whose_leftovers_are_removed(case, as_directory, tmp_path):
    owner, age, removed = CASES[case]
    leftover = tmp_path / owner().temporary()
    if as_directory:
        leftover.mkdir()
        (leftover / "model.pt").write_bytes(b"half")
    else:
        leftover.write_bytes(b"half")
    if age == "boot":
        age = time.clock_gettime(time.CLOCK_BOOTTIME) + 60
    os.utime(leftover, (time.time() - age,) * 2)
    sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    assert leftover.exists() != removed


def test_a_killed_process_that_nobody_has_waited_for(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        leftover = tmp_path / Owner(process.pid).temporary()
        leftover.write_bytes(b"half")
        sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
        assert leftover.exists()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
        assert not leftover.exists()


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    prefix = temporary_names.prefix_of("model.pt")
    host, boot, namespace, *_ = temporary_names.owner(os.getpid()).split("-")
    here = f"{host}-{boot}-{namespace}"
    names = [
        Owner(DEAD, 1).temporary("other.pt"),
        f"{prefix}.sdio-tmp",
        f"{prefix}x.sdio-tmp",
        f"{prefix}a-b-c-d-e.sdio-tmp",
        f"{prefix}{here}-zz-1.0-0.sdio-tmp",
        f"{prefix}{here}-1-zz.0-0.sdio-tmp",
        f"{prefix}{here}-{'f' * 40}-1.0-0.sdio-tmp",
        f"{prefix}{here}-{DEAD:x}-1.0-0",
        "model.pt.tmp",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    # A process id as large as that cannot be, but cannot be looked up either.
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model.pt"])


def test_a_cut_boot_or_machine_record_condemns_nobody(tmp_path, monkeypatch):
    """A process that could not read who it is - no descriptors left, no /proc - removes nothing that may live."""
    living = tmp_path / Owner(os.getppid()).temporary()
    living.write_bytes(b"half")
    monkeypatch.setattr(machine, "_read", lambda path: "")
    for cached in (temporary_names.owner, temporary_names._machine):
        cached.cache_clear()
    try:
        sio.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    finally:
        for cached in (temporary_names.owner, temporary_names._machine):
            cached.cache_clear()
    assert living.exists()


@pytest.mark.parametrize(
    "name", ["x" * 252 + ".pt", "é" * 126 + ".pt", "模" * 84 + ".pt", "x" * 59 + "模.pt", "a.b c.pt"]
)
def test_names_of_temporaries(name, backend, tmp_path):
    """Short enough, whole characters, hidden, and never what somebody who looks for *.pt finds."""
    seen = []
    sio.save(
        {"weight": torch.ones(3)},
        tmp_path / name,
        backend=backend,
        progress=lambda *_: seen.extend(os.listdir(tmp_path)),
    )
    assert os.listdir(tmp_path) == [name]
    (temporary,) = set(seen)
    assert len(os.fsencode(temporary)) < 190
    assert temporary.encode("utf-8", "strict")
    assert temporary.startswith(".") and temporary.endswith(".sdio-tmp")
