"""Reserving the shared file's blocks, on real file systems that can, cannot, and are too small."""

import contextlib
import errno
import os

import pytest
from faults.file_systems import made

from statedict_io.backends.strips import preallocate

NBYTES = 16 << 20

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


@pytest.fixture
def file_on(tmp_path):
    with contextlib.ExitStack() as stack:

        def opened(file_system, nbytes):
            directory = stack.enter_context(made(file_system, tmp_path, nbytes=nbytes))
            fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, fd)
            return fd

        yield opened


def test_blocks_are_there(file_on):
    fd = file_on("tmpfs", 2 * NBYTES)
    preallocate(fd, NBYTES)
    assert os.fstat(fd).st_blocks * 512 == os.fstat(fd).st_size == NBYTES


def test_a_full_disk_shows_at_once(file_on):
    with pytest.raises(OSError) as raised:
        preallocate(file_on("tmpfs", NBYTES // 2), NBYTES)
    assert raised.value.errno == errno.ENOSPC


def test_where_it_is_refused_nothing_is_written(file_on):
    """C libraries write into each block then: on a network file system, possibly over what other machines wrote."""
    fd = file_on("ext2", NBYTES)
    preallocate(fd, NBYTES)
    assert os.fstat(fd).st_blocks == 0
