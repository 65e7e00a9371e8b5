"""Tensors on an accelerator, through a stand-in for one: the checks of device_standin/.

The stand-in takes the one PrivateUse1 device that a process can have, so all checks run in one process beside this one.
To run them by hand: ``pytest tests/device_standin/*checks.py``.
"""

import ast
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import pytest

CHECKS = [
    pathlib.Path(__file__).with_name("device_standin") / name
    for name in ("checks.py", "async_checks.py", "load_checks.py", "copies_checks.py", "slower_checks.py")
]
NAMES = [
    node.name
    for file in CHECKS
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


# The first of them waits for all.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, request):
    """(the <testcase> elements of every check, what the run printed)."""
    directory = tmp_path_factory.mktemp("device")
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *map(str, CHECKS)]
    is_long = request.config.getoption("--long")
    command += ["--long"] * is_long
    command += [f"--junitxml={report}", f"--basetemp={directory / 'checks'}"]
    try:
        limit = 1500 if is_long else 1200
        run = subprocess.run(command, cwd=CHECKS[0].parents[2], capture_output=True, text=True, timeout=limit)
        printed = run.stdout + run.stderr
    except subprocess.TimeoutExpired as hang:
        printed = f"{hang}\n{(hang.stdout or b'').decode()}"
    if not report.exists():
        pytest.fail(f"the checks did not come to an end:\n{printed[-10_000:]}")
    return list(xml.etree.ElementTree.parse(report).iter("testcase")), printed


@pytest.mark.parametrize("name", NAMES)
def test_device(cases, name):
    elements, printed = cases
    ours = [case for case in elements if case.get("name").split("[")[0] == name]
    assert ours, f"{name} did not run:\n{printed[-10_000:]}"
    failures = [found for case in ours for kind in ("failure", "error") for found in case.iter(kind)]
    assert not failures, "\n\n".join(found.text for found in failures)
    skipped = [found.get("message") for case in ours for found in case.iter("skipped")]
    if skipped:
        pytest.skip(f"{len(skipped)} of {len(ours)}: {skipped[0]}")
