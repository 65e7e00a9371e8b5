"""Processes whose standard input, output and error are closed: nothing is opened for writing under their
numbers, or what anybody prints would go into a checkpoint."""

import os
import pathlib
import subprocess
import sys

import pytest
import warm_process

PROCESS = pathlib.Path(__file__).parent / "closed_descriptors_process.py"
IMPORTED = ("torch.distributed.checkpoint", "statedict_io.conversion", "statedict_io.dcp.conversion")
CLOSED = [(0,), (1,), (2,), (0, 1, 2)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_no_file_of_ours_has_a_number_of_the_standard_three(closed, backend, tmp_path):
    (tmp_path / "files").mkdir()
    report = tmp_path / "report"
    status = warm_process.run(
        *(PROCESS, tmp_path / "files", backend, report), timeout=600, imported=IMPORTED, closed=closed
    ).returncode
    assert (report.read_text() if report.exists() else "no report", status) == ("as expected", 0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_nor_one_that_was_opened_by_an_import(backend, tmp_path):
    def close():
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    (tmp_path / "files").mkdir()
    report = tmp_path / "report"
    command = [sys.executable, PROCESS, tmp_path / "files", backend, report]
    status = subprocess.run(command, preexec_fn=close, timeout=600).returncode
    assert (report.read_text() if report.exists() else "no report", status) == ("as expected", 0)
