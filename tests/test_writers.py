"""File objects whose ``write`` returns something else than the number of bytes that it was given."""

import gzip
import io
import os
import zlib

import pytest
import torch

import statedict_io as sio

# Large enough for several pieces on both backends.
STATE = {"weight": torch.arange(3 << 18, dtype=torch.int32), "bias": torch.arange(5)}


def count(file, data):
    """Fails a save that hands over bytes again that were taken, which would go on nearly for ever."""
    file.given = getattr(file, "given", 0) + len(data)
    assert file.given < 2 * STATE["weight"].nbytes, "bytes that were taken came again"


class Buffer:
    """Keeps what it is given; ``answer`` is what ``write`` returns."""

    def __init__(self, answer=len):
        self.data = bytearray()
        self.answer = answer

    def write(self, data):
        count(self, data)
        self.data += data
        return self.answer(data)

    def flush(self):
        pass

    def finished(self):
        return bytes(self.data)


class RawBuffer(Buffer, io.RawIOBase):
    """The same as a raw file without a descriptor, made by somebody who thinks little of the result."""

    def writable(self):
        return True


class Compressing(Buffer):
    """Returns the size of what the data was compressed to, as zstandard's ``stream_writer`` may."""

    def __init__(self):
        super().__init__()
        self.compressor = zlib.compressobj(1)

    def write(self, data):
        count(self, data)
        made = self.compressor.compress(data)
        self.data += made
        return len(made)

    def finished(self):
        return zlib.decompress(bytes(self.data) + self.compressor.flush())


class Gzip(gzip.GzipFile):
    def __init__(self):
        self.below = io.BytesIO()
        super().__init__(fileobj=self.below, mode="wb", compresslevel=1)

    def write(self, data):
        count(self, data)
        super().write(data)
        return True

    def finished(self):
        self.close()
        return gzip.decompress(self.below.getvalue())


class Halves(RawBuffer):
    """Takes half of what it is given and says so, as a raw file may."""

    def write(self, data):
        taken = max(1, len(data) // 2)
        self.data += data[:taken]
        return taken


WRITERS = {
    "none": lambda: Buffer(lambda data: None),
    "one": lambda: Buffer(lambda data: 1),
    "true": lambda: Buffer(lambda data: True),
    "zero": lambda: Buffer(lambda data: 0),
    "negative": lambda: Buffer(lambda data: -1),
    "half": lambda: Buffer(lambda data: len(data) // 2),
    "text": lambda: Buffer(lambda data: "all"),
    "raw none": lambda: RawBuffer(lambda data: None),
    "raw true": lambda: RawBuffer(lambda data: True),
    "raw too many": lambda: RawBuffer(lambda data: len(data) + 1),
    "raw halves": Halves,
    "compressing": Compressing,
    "gzip, true": Gzip,
}


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def zipped(request):
    return request.param


@pytest.mark.parametrize("name", WRITERS)
def test_a_writers_result_counts_only_where_it_is_a_raw_files(name, zipped, backend):
    whole = io.BytesIO()
    torch.save(STATE, whole, _use_new_zipfile_serialization=zipped)
    file = WRITERS[name]()
    sio.save(STATE, file, backend=backend, _use_new_zipfile_serialization=zipped)
    found = file.finished()
    if zipped:
        assert found == whole.getvalue()
    else:  # the storages' keys are addresses
        assert len(found) == len(whole.getvalue())
        assert torch.equal(torch.load(io.BytesIO(found))["weight"], STATE["weight"])


def test_a_full_pipe_that_does_not_block_is_an_error(zipped, backend):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb", buffering=0), open(writing, "wb", buffering=0) as file, pytest.raises(BlockingIOError):
        sio.save(STATE, file, backend=backend, _use_new_zipfile_serialization=zipped)


def test_a_raw_file_that_takes_nothing_is_an_error(zipped, backend):
    with pytest.raises(OSError, match="wrote nothing"):
        sio.save(STATE, RawBuffer(lambda data: 0), backend=backend, _use_new_zipfile_serialization=zipped)
