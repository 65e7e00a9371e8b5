"""csrc/boundary/torch_functions.h through ctypes: the functions of the installed torch's ``_torch`` module."""

import ctypes
import importlib
import pathlib
import re

import torch

HEADER = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "boundary" / "torch_functions.h"
CAPSULE = b"statedict_io.torch_functions"
NAME = "_torch_" + "_".join(re.match(r"(\d+)\.(\d+)", torch.__version__).groups())

OK, FAILED, NO_MEMORY, UNSUPPORTED = range(4)


class Error(ctypes.Structure):
    _fields_ = [("message", ctypes.c_char * 1000)]


class StorageFacts(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_uint64),
        ("on_host", ctypes.c_int),
    ]


class PlainTensor(ctypes.Structure):
    _fields_ = [
        ("storage", ctypes.c_void_p),
        ("dtype", ctypes.c_void_p),
        ("storage_offset", ctypes.c_int64),
        ("itemsize", ctypes.c_int64),
        ("num_dimensions", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("requires_grad", ctypes.c_int),
    ]


class DeviceBytes(ctypes.Structure):
    _fields_ = [("storage", ctypes.c_void_p), ("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


Release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_void_p, _size, _u64, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_int
_bytes_p, _status_p, _error_p = ctypes.POINTER(DeviceBytes), ctypes.POINTER(ctypes.c_int), ctypes.POINTER(Error)

# Called with the GIL, and a Python error is raised.
WITH_GIL = {
    "storage_of": (_void_p, ctypes.py_object),
    "storage_retain": (_void_p, _void_p),
    "storage_wrap": (ctypes.py_object, _void_p),
    "storage_facts": (_int, _void_p, ctypes.POINTER(StorageFacts)),
    "storage_device": (None, _void_p, ctypes.c_char_p, _size),
    "storage_over": (ctypes.py_object, _void_p, _u64, Release, _void_p),
    "plain_tensor": (_int, ctypes.py_object, ctypes.POINTER(PlainTensor)),
    "fix": (_void_p, ctypes.POINTER(_void_p), _size),
    "unfix": (None, _void_p),
    "forget_fixed": (None,),
    "destination_storage": (ctypes.py_object, _void_p, _size),
}
WITHOUT_GIL = {
    "storage_release": (None, _void_p),
    "pin": (_void_p, _size, ctypes.POINTER(_void_p)),
    "unpin": (None, _void_p),
    "source_new": (_void_p, _bytes_p, _size, _status_p, _error_p),
    "source_copy": (_int, _void_p, _void_p, _size, _void_p, _error_p),
    "source_delete": (None, _void_p),
    "destination_new": (_void_p, ctypes.c_char_p, ctypes.POINTER(_u64), _size, _status_p, _error_p),
    "destination_copy": (_void_p, _void_p, _void_p, _size, _status_p, _error_p),
    "copies_wait": (_int, _void_p, _error_p),
    "copies_delete": (None, _void_p),
    "destination_delete": (None, _void_p),
    "clones_new": (_void_p, _bytes_p, _size, _status_p, _error_p),
    "clones_of": (DeviceBytes, _void_p, _size),
    "clones_done": (_int, _void_p),
    "clones_wait": (_int, _void_p, _error_p),
    "clones_delete": (None, _void_p),
    "step_begin": (_void_p, ctypes.c_char_p),
    "step_end": (None, _void_p),
    "recording_of_this_thread": (_void_p,),
    "recording_continue": (None, _void_p),
    "recording_delete": (None, _void_p),
}


def version_in_header():
    return int(re.search(r"define SDIO_TORCH_FUNCTIONS_VERSION (\d+)", HEADER.read_text())[1])


def names_in_header():
    """The functions of the table, in its order."""
    table = HEADER.read_text().split("uint32_t version;")[1]
    return re.findall(r"\(\*(\w+)\)\((?!void\* context)", table)


def module():
    """The module; raises ModuleNotFoundError where it was not built."""
    return importlib.import_module(f"statedict_io.{NAME}")


class Functions:
    """The table: ``version``, ``torch_version``, ``addresses`` by name, and the functions as attributes."""

    def __init__(self):
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(module().functions, CAPSULE)
        names = names_in_header()

        class Table(ctypes.Structure):
            _fields_ = [
                ("version", ctypes.c_uint32),
                ("torch_version", ctypes.c_char_p),
                *((name, ctypes.c_void_p) for name in names),
            ]

        table = Table.from_address(address)
        self.version, self.torch_version = table.version, table.torch_version.decode()
        self.addresses = {name: getattr(table, name) for name in names}
        for make, signatures in ((ctypes.PYFUNCTYPE, WITH_GIL), (ctypes.CFUNCTYPE, WITHOUT_GIL)):
            for name, signature in signatures.items():
                setattr(self, name, make(*signature)(self.addresses[name]))
