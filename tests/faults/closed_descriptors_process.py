"""Does everything, and looks at descriptors 0 to 2 wherever it is called back; run by test_closed_descriptors.py.

closed_descriptors_process.py DIRECTORY BACKEND REPORT
"""

import fcntl
import os
import pathlib
import sys
import traceback
import warnings

import torch
import torch.distributed.checkpoint as dcp

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader, SingleFileWriter
from statedict_io.dcp.conversion import dcp_to_file, file_to_dcp


class Watch:
    """A progress callback, and a context in which every opened file is looked at."""

    def __init__(self, directory):
        self._directory = str(directory)
        self.num_looks = 0
        self.found = []

    def __call__(self, *_):
        self.num_looks += 1
        for descriptor in range(3):
            try:
                name = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:
                continue
            # One for reading does no harm, and torch.load opens its own.
            if (
                name.startswith(self._directory)
                and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            ):
                self.found.append(f"{descriptor}: {name}")

    def hear(self, event, _):
        """As an audit hook: before the next file is opened, the last ones are there."""
        if event in ("open", "os.rename", "os.remove", "os.posix_fadvise", "mmap.__new__"):
            self()


def main(directory, backend):
    warnings.simplefilter("ignore")
    watch = Watch(directory)
    sys.addaudithook(watch.hear)
    state = {"w": torch.arange(3 << 20, dtype=torch.int32), "step": torch.tensor(1)}
    path = directory / "model.pt"
    for options in ({}, {"durable": False}, {"atomic": False}):
        sio.save(state, path, backend=backend, progress=watch, **options)
        sio.save_async(state, path, backend=backend, progress=watch, **options).result()
    sio.save(state, directory / "legacy.pt", backend=backend, _use_new_zipfile_serialization=False)
    with sio.patch_torch(backend=backend, progress=watch):
        torch.save(state, path)
    for options in ({}, {"verify": True}, {"mmap": True}):
        sio.load(path, backend=backend, progress=watch, **options)
    sio.load(directory / "legacy.pt", backend=backend)
    assert sio.verify(path, backend=backend, progress=watch).ok
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        watch()
        checkpoint["w"]
    convert(str(path), str(directory / "model.safetensors"))
    convert(str(directory / "model.safetensors"), str(directory / "again.pt"))
    file_to_dcp(path, directory / "of dcp")
    dcp_to_file(directory / "of dcp", directory / "back.pt")
    writer = SingleFileWriter(directory / "single.pt", backend=backend, progress=watch)
    dcp.save(state, storage_writer=writer, no_dist=True)
    dcp.load(state, storage_reader=SingleFileReader(directory / "single.pt", backend=backend), no_dist=True)
    assert watch.num_looks > 30
    assert watch.found == [], sorted(set(watch.found))


if __name__ == "__main__":
    report = pathlib.Path(sys.argv[3])
    try:
        main(pathlib.Path(sys.argv[1]), sys.argv[2])
        report.write_text("as expected")
    except BaseException:
        report.write_text(traceback.format_exc())
        raise SystemExit(1) from None
