"""Whatever reads a file beside a process that replaces it reads one version: none is mixed, nothing is raised."""

import time

import pytest

from . import ranks, replaced
from .ranks import all_well, run_ranks

LONG = pytest.mark.long


@pytest.fixture
def directory(tmp_path):
    """In which ``model.pt`` and ``model.safetensors`` are replaced as fast as that goes."""
    replaced.write_versions(tmp_path)
    over = ranks._context.Event()
    num_saves = ranks._context.Value("q", 0)
    saver = ranks._context.Process(target=replaced.replace_until, args=(over, str(tmp_path), num_saves))
    saver.start()
    deadline = time.monotonic() + 120
    while num_saves.value == 0 and saver.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)  # it starts, and imports torch
    yield str(tmp_path)
    over.set()
    saver.join(60)
    assert saver.exitcode == 0 and num_saves.value > 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seconds", [1.5, pytest.param(60, marks=LONG)])
def test_many_ranks_load_one_version(directory, backend, seconds, report_counts):
    found = all_well(run_ranks(2, replaced.load_in_ranks, directory, seconds, backend, seconds=seconds + 60))
    (num_loads, mixed, _), *_ = found
    raised = [text for of_rank in found for text in of_rank[2]]
    report_counts(f"dcp.load of 2 ranks beside a saver, {backend}: {num_loads}, mixed {mixed}, raised {len(raised)}")
    assert (mixed, raised[:1]) == (0, [])
    assert num_loads > 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=LONG)])
@pytest.mark.parametrize("reader", replaced.READERS)
def test_one_process_reads_one_version(directory, backend, reader, seconds, report_counts):
    if "safetensors" in reader:
        pytest.importorskip("safetensors")
    arguments = (directory, seconds, backend, reader)
    ((num_reads, mixed, raised),) = all_well(run_ranks(1, replaced.read_alone, *arguments, seconds=seconds + 60))
    report_counts(f"{reader} beside a saver, {backend}: {num_reads}, mixed {mixed}, raised {len(raised)}")
    assert (mixed, raised[:1]) == (0, [])
    assert num_reads > 0


@pytest.mark.parametrize("reader", replaced.READERS)
def test_a_reader_opens_its_file_once(tmp_path, backend, reader):
    if "safetensors" in reader:
        pytest.importorskip("safetensors")
    replaced.write_versions(tmp_path)
    assert all_well(run_ranks(1, replaced.count_opens, str(tmp_path), backend, reader)) == [1]
