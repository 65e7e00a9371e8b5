"""A directory held open, and what is asked of it once it is closed."""

import errno
import os
import subprocess
import sys

import pytest

from statedict_io.system import directories
from statedict_io.system.directories import OpenDirectory

# What names a file in it, or the directory itself.
USES = {
    "look_at": lambda directory: directory.look_at("model.pt"),
    "open": lambda directory: os.close(directory.open("model.pt", os.O_RDONLY)),
    "check_exists": lambda directory: directory.check_exists("model.pt"),
    "check_writable": lambda directory: directory.check_writable("model.pt"),
    "read_link": lambda directory: directory.read_link("link"),
    "move": lambda directory: directory.move("model.pt", "moved.pt"),
    "remove_file": lambda directory: directory.remove_file("model.pt"),
    "empty_file": lambda directory: directory.empty_file("model.pt"),
    "names": lambda directory: directory.names(),
    "below": lambda directory: OpenDirectory("below", below=directory),
    "sync": lambda directory: directory.sync(),
}


@pytest.mark.parametrize("has_descriptors", [True, False])
@pytest.mark.parametrize("use", USES)
def test_a_closed_directory_reaches_no_other(use, has_descriptors, tmp_path, monkeypatch):
    """Not the one that has its descriptor's number now, nor the working directory."""
    monkeypatch.setattr(directories, "_HAS_DESCRIPTORS", has_descriptors)
    (tmp_path / "closed").mkdir()
    other_path = tmp_path / "other"
    (other_path / "below").mkdir(parents=True)
    (other_path / "model.pt").write_bytes(b"whole")
    (other_path / "link").symlink_to("model.pt")
    monkeypatch.chdir(other_path)
    closed = OpenDirectory(str(tmp_path / "closed"))
    number = closed.fd
    closed.close()
    other = OpenDirectory(os.curdir)
    assert other.fd == number
    with pytest.raises(OSError) as caught:
        USES[use](closed)
    assert caught.value.errno == errno.EBADF
    assert sorted(os.listdir(other_path)) == ["below", "link", "model.pt"]
    assert (other_path / "model.pt").read_bytes() == b"whole"
    other.close()


@pytest.mark.parametrize("sensitive", [True, False])
def test_a_target_is_the_same_after_it_is_closed(sensitive, tmp_path, monkeypatch):
    """On both kinds of volumes of macOS."""

    def pathconf(fd, name):
        assert name == 11
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return int(sensitive)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "pathconf", pathconf)
    directory = OpenDirectory(str(tmp_path))
    names = ["Model.pt", "model.pt"]
    before = [directory.identity_of(name) for name in names]
    assert (before[0] != before[1]) is sensitive
    directory.close()
    assert [directory.identity_of(name) for name in names] == before


WRAPPED = """
import functools, os, stat
for name in ("open", "stat", "access", "unlink", "mkdir", "rename", "replace"):
    setattr(os, name, functools.partial(getattr(os, name)))
import torch
import statedict_io as sio
synced, sync = [], os.fsync
def noted(fd):
    synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))
    return sync(fd)
os.fsync = noted
sio.save({"w": torch.ones(3)}, "model.pt")
assert synced == [False, True], synced
"""


def test_wrapped_functions_of_os_take_no_descriptors_away(tmp_path):
    """A program may wrap them before it imports this package, to trace its files: what is durable stays so."""
    done = subprocess.run(
        [sys.executable, "-c", WRAPPED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(directories.__file__)) + "/.."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
