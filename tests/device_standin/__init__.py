"""The device "standin": host memory behind torch's PrivateUse1 key, whose copies finish late. See standin.cpp.

A process can have one PrivateUse1 device, and having it changes what torch says of accelerators: register() belongs
into a process of its own.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import types

import torch

NAME = "standin"
_SOURCE = pathlib.Path(__file__).with_name("standin.cpp")
_BUILD = _SOURCE.parents[2] / "build" / "device_standin"


def compiler():
    """The path of a C++ compiler, or None."""
    wish = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, [*wish[:1], "c++", "g++", "clang++"])), None)


def build():
    """Compiles standin.cpp, unless that was done before with the same torch; returns the library's path."""
    package = pathlib.Path(torch.__file__).parent
    command = [compiler(), "-std=c++17" if torch.__version__ < "2.14" else "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += ["-isystem", str(package / "include"), "-L", str(package / "lib"), "-pthread"]
    key = hashlib.sha256("\0".join([torch.__version__, *command, _SOURCE.read_text()]).encode()).hexdigest()[:16]
    library = _BUILD / f"standin-{key}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        # Several processes may build at once: each has its own file until it is whole.
        with tempfile.TemporaryDirectory(dir=_BUILD) as directory:
            built = pathlib.Path(directory, library.name)
            whole = [*command, str(_SOURCE), "-ltorch_cpu", "-lc10", "-o", str(built)]
            done = subprocess.run(whole, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(whole)}\n{done.stderr[-10_000:]}")
            os.replace(built, library)
    return library


class Standin:
    """The settings and counters of standin.cpp as attributes; of one device as items: ``standin["commands:1"]``."""

    def __init__(self, library):
        library.standin_has.restype = ctypes.c_bool
        library.standin_get.restype = ctypes.c_int64
        library.standin_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self.__dict__["_library"] = library

    def _known(self, name):
        if not self._library.standin_has(name.encode()):
            raise AttributeError(f"the stand-in has no {name}")
        return name.encode()

    def __getattr__(self, name):
        return self._library.standin_get(self._known(name))

    __getitem__ = __getattr__

    def __setattr__(self, name, number):
        self._library.standin_set(self._known(name), int(number))

    def drain(self):
        """Waits until every queued command has run."""
        self._library.standin_drain()

    def reset(self):
        """Drains, then gives settings and counters their first values."""
        self._library.standin_reset()


@contextlib.contextmanager
def _device(device):
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(torch.device(device).index)
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


@functools.cache
def register():
    """Makes "standin:0" and "standin:1" devices of this process, once; returns its Standin.

    ``torch.standin.memory`` is what each says of its memory: (free, total), in bytes.
    """
    standin = Standin(ctypes.CDLL(str(build())))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = torch.accelerator.current_device_index
    module.device = _device
    module.memory = (0, 0)
    module.mem_get_info = lambda device: module.memory
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return standin
