"""Fails unless the sanitizers watch the extension: sanitizer_canary.py TREE REPORTS. Called by sanitize_python.sh.

Reads past the end of a block through the extension, in a process of its own, which must not survive; and looks whether
the extension that the tests will load is that of TREE.
"""

import ctypes
import os
import pathlib
import subprocess
import sys


def read_past_the_end(nbytes):
    from statedict_io import _core

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(nbytes)
    _core.crc32((ctypes.c_char * (2 * nbytes)).from_address(block))


def main(tree, reports):
    import torch  # noqa: F401 - the extension's libraries

    import statedict_io
    from statedict_io import _core

    assert statedict_io.backend_info().name == "native", statedict_io.backend_info()
    assert pathlib.Path(_core.__file__).parent == pathlib.Path(tree, "statedict_io"), _core.__file__
    died = subprocess.run([sys.executable, __file__, "read past the end"], check=False, capture_output=True, text=True)
    written = [path for path in pathlib.Path(reports).iterdir() if "heap-buffer-overflow" in path.read_text()]
    assert died.returncode != 0 and len(written) == 1, f"a planted overflow was not reported: {died}"
    report = written[0].read_text()
    assert "crc32" in report, report
    for path in pathlib.Path(reports).iterdir():
        path.unlink()
    print(f"a planted overflow in {_core.__file__} was reported")


if __name__ == "__main__":
    if sys.argv[1] == "read past the end":
        import torch  # noqa: F401

        read_past_the_end(64)
        os._exit(0)
    main(*sys.argv[1:])
