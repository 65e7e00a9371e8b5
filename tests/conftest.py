"""Options, markers and fixtures that every test shares."""

import contextlib
import fcntl
import gc
import importlib.util
import os

import pytest
import torch

import statedict_io as sio

COUNTS = "counts"


def promised(name):
    return os.environ.get(name) == "1"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests marked long (gigabytes, minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: needs gigabytes of disk or minutes; runs with --long")
    config.addinivalue_line("markers", "alone: depends on time; no other process of pytest-xdist runs a test meanwhile")
    config.addinivalue_line("markers", "cuda: needs a CUDA device; fails without one where STATEDICT_IO_REQUIRE_CUDA=1")


#: The files that take longest, in that order. pytest-xdist gives each file to one process: where the long ones begin
#: first, no process is left alone with one of them at the end.
LONGEST = (
    "test_device.py",
    "faults/test_fault_injection.py",
    "integrations/test_examples.py",
    "test_small_files.py",
    "test_benchmarks.py",
    "test_patching.py",
    "test_swapped_names.py",
    "faults/test_async_processes.py",
    "faults/test_nested_saves.py",
    "faults/test_crashes.py",
    "checkpoints/test_kills.py",
    "checkpoints/test_faults.py",
    "faults/test_file_systems.py",
    "faults/test_memory_limits.py",
    "test_byte_identity.py",
    "test_load_as_torch.py",
    "dcp/test_replaced_meanwhile.py",
    "test_freed.py",
    "remote/test_s3_faults.py",
    "dcp/test_files.py",
    "test_exit.py",
    "test_read_amounts.py",
)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        turns = {name: turn for turn, name in enumerate(LONGEST)}
        items.sort(key=lambda item: turns.get(os.path.relpath(item.path, os.path.dirname(__file__)), len(turns)))
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="runs with --long"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # some tests collect again and again: what is there already need not be searched


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    if not hasattr(item.config, "workerinput"):  # the variables of pytest-xdist reach the pytest that a test starts too
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    # Who waits for the room holds the gate: otherwise the tests of others would enter one after the other.
    with contextlib.ExitStack() as room:
        with locked(os.path.dirname(__file__), fcntl.LOCK_EX):
            room.enter_context(locked(__file__, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@contextlib.contextmanager
def locked(path, how):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to children that a test has forked
        os.close(descriptor)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        if promised("STATEDICT_IO_REQUIRE_CUDA"):
            pytest.fail("STATEDICT_IO_REQUIRE_CUDA=1, but torch.cuda.is_available() is False")
        pytest.skip("no CUDA device")


def require_native():
    """Skips, or fails where the extension is promised, when it can't be used."""
    info = sio.backend_info()
    if info.name != "native":
        if promised("STATEDICT_IO_REQUIRE_NATIVE"):
            pytest.fail(f"STATEDICT_IO_REQUIRE_NATIVE=1, but the extension can't be used: {info.reason}")
        pytest.skip(f"no native backend: {info.reason}")


def require_torch_module():
    """Skips where ``_core`` does without a module for this torch."""
    require_native()
    if sio.backend_info().built_for_torch is None:
        pytest.skip("no _torch module for this torch")


def require_package(name):
    """Skips, or fails where what plugs into other libraries is promised to be tested, when one is missing."""
    if importlib.util.find_spec(name) is None:
        if promised("STATEDICT_IO_REQUIRE_INTEGRATIONS"):
            pytest.fail(f"STATEDICT_IO_REQUIRE_INTEGRATIONS=1, but {name} is not installed")
        pytest.skip(f"needs {name}: pip install 'statedict-io[test-integrations]'")


@pytest.fixture(params=["native", "torch"])
def backend(request):
    """Each backend by name; a test that takes it runs on both."""
    if request.param == "native":
        require_native()
    return request.param


@pytest.fixture
def report_counts(record_property):
    """report_counts(line): what a test has counted, shown at the end of the run."""

    def report(line):
        record_property(COUNTS, line)

    return report


def pytest_terminal_summary(terminalreporter):
    # Properties come from the processes of pytest-xdist too, whose output nobody sees.
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    lines = [
        line for report in reports if report.when == "call" for key, line in report.user_properties if key == COUNTS
    ]
    if lines:
        terminalreporter.section("counts")
        for line in sorted(lines):
            terminalreporter.line(line)


@pytest.fixture
def saved_bytes(tmp_path, backend):
    """saved_bytes(obj, name="model.pt", **options): the file that sio.save writes, read back."""

    def save(obj, name="model.pt", **options):
        path = tmp_path / name
        sio.save(obj, path, backend=backend, **options)
        return path.read_bytes()

    return save
