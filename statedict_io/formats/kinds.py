"""What kind of file something is, told from its content: for what is no checkpoint in torch's zip format.

Such a file is not damaged; another tool reads it. What no kind is recognized in is left to the caller.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

ZIP_START = b"PK\x03\x04"
#: so much of a file's beginning tells its kind
START_NBYTES = 512
# The number with which torch's format before 1.6 begins, as protocols 1 to 5 of pickle and protocol 0 write it. From
# protocol 4 on it stands behind the length of a frame.
_LEGACY_NUMBERS = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"L119547037146038801333356L\n")
_LEGACY_NUMBER_WITHIN = 32
_LOCAL_HEADER_NBYTES = 30
# Names of records, without the archive's folder.
_STORAGES = "data/"
_OF_TORCH_SAVE = {_STORAGES, "data.pkl", "byteorder", "version", ".format_version", ".storage_alignment"}
#: a record that every TorchScript archive has
CONSTANTS = "constants.pkl"
_OF_TORCHSCRIPT = {CONSTANTS, "bytecode.pkl"}
_OF_PACKAGES = {"extern_modules", ".data/extern_modules"}
_OF_EXPORTED = {"archive_format", "serialized_exported_program.json"}
_TELLING_NAMES = _OF_TORCH_SAVE | _OF_TORCHSCRIPT | _OF_PACKAGES | _OF_EXPORTED


class FileKind(NamedTuple):
    what: str  #: such as "a safetensors file"
    cure: str  #: what to do with one, in the imperative

    def __str__(self) -> str:
        return f"is {self.what}: {self.cure}"


_CONVERT = "statedict-io convert"
# These are read, but not where an archive is wanted.
SAFETENSORS = FileKind(
    "a safetensors file, which is no archive of torch.save",
    f"load it with statedict_io.load, or convert it: `{_CONVERT} X.safetensors X.pt`",
)
LEGACY = FileKind(
    "in torch's legacy format, which is no archive",
    f"load it with statedict_io.load, or convert it: `{_CONVERT} OLD NEW.pt`",
)
TORCHSCRIPT = FileKind("a TorchScript archive", "load it with torch.jit.load; save the state_dict() of that")
MOBILE = FileKind(
    "a TorchScript archive for the mobile interpreter",
    "load it with torch.jit.mobile, or with torch.jit.load; save the state_dict() of that",
)
PACKAGE = FileKind("an archive of torch.package", "read it with torch.package.PackageImporter")
EXPORTED = FileKind("an exported program (.pt2)", "load it with torch.export.load; save the state_dict of that")
NUMPY_ARCHIVE = FileKind("a zip archive of NumPy arrays (.npz)", "load it with numpy.load")
PLAIN_ZIP = FileKind("a zip archive that torch.save did not write", "unpack it; the checkpoint may be a file in it")
DCP_PART = FileKind(
    "one rank's part of a checkpoint of torch.distributed.checkpoint",
    f"read the directory with it: `{_CONVERT} DIRECTORY FILE.pt`",
)
DCP_METADATA = FileKind(
    "the metadata of a checkpoint of torch.distributed.checkpoint",
    f"read the directory that it is in: `{_CONVERT} DIRECTORY FILE.pt`",
)
TAR = FileKind("a tar archive", "load it with torch.load if torch before 0.1.10 wrote it, else unpack it")
PICKLE = FileKind("a plain pickle, which torch.save did not write", "load it with pickle.load if you trust it")
LFS_POINTER = FileKind("a pointer of git LFS, not the file itself", "fetch the file with `git lfs pull`")
WEB_PAGE = FileKind("a web page", "the download gave an error or a login page: look at it, and download the file again")
JSON = FileKind("JSON text", "name the weights, or their index, which has a 'weight_map'")
UNKNOWN = FileKind(
    "not a checkpoint",
    "if it should be one, its beginning is damaged: copy it again from where it came from",
)

_STARTS = {
    b"PK\x05\x06": PLAIN_ZIP,  # an empty one
    b"\x1f\x8b": FileKind("compressed by gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": FileKind("compressed by Zstandard", "unpack it with unzstd"),
    b"\xfd7zXZ\0": FileKind("compressed by xz", "unpack it with unxz"),
    b"BZh": FileKind("compressed by bzip2", "unpack it with bunzip2"),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7-Zip archive", "unpack it"),
    b"\x89HDF\r\n\x1a\n": FileKind("an HDF5 file", "read it with h5py"),
    b"GGUF": FileKind("a GGUF file", "read it with the gguf package"),
    b"\x93NUMPY": FileKind("a NumPy array (.npy)", "load it with numpy.load"),
    b"version https://git-lfs.github.com/": LFS_POINTER,
}


def is_legacy(start: bytes) -> bool:
    """``start``: the file's first 32 bytes or more."""
    return any(number in start[:_LEGACY_NUMBER_WITHIN] for number in _LEGACY_NUMBERS)


def of_start(start: bytes, path: str) -> FileKind | None:
    """The kind of a file by its beginning; None for a zip archive, sound or perhaps damaged.

    Args:
        start: the file's first ``START_NBYTES`` bytes, or all of it.
        path: of two kinds that only their names tell from others, and of a safetensors file with a damaged beginning.
    """
    found = _of_start(start, path)
    may_be_damaged = found is UNKNOWN or (found is None and not start.startswith(ZIP_START[:2]))
    return SAFETENSORS if may_be_damaged and path.endswith(".safetensors") else found


def _of_start(start: bytes, path: str) -> FileKind | None:
    if start.startswith(ZIP_START) and path.endswith(".distcp"):  # archives one behind the other
        return DCP_PART
    if start.startswith(ZIP_START) or not start.strip(b"\0") or ZIP_START.startswith(start):
        return None
    if is_legacy(start):
        return LEGACY
    for beginning, kind in _STARTS.items():
        if start.startswith(beginning):
            return kind
    if start[257:262] == b"ustar":
        return TAR
    if is_safetensors(start):
        return SAFETENSORS
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return DCP_METADATA if os.path.basename(path) == ".metadata" else PICKLE
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|\?xml|head|body)\b", text, re.IGNORECASE):
        return WEB_PAGE
    return JSON if text[:1] in (b"{", b"[") else UNKNOWN


def described(kind: FileKind, start: bytes) -> str:
    """``kind``, and where that says nothing how the file begins."""
    return str(kind) if kind is not UNKNOWN else f"is {kind.what}: its first bytes are {start[:16]!r}; {kind.cure}"


def damaged_start(start: bytes) -> str:
    """What is wrong with a file in which :func:`of_start` finds a zip archive that may be damaged, and which does not
    begin like one."""
    if not start:
        return "the file is empty"
    return "the file begins with zero bytes" if not start.strip(b"\0") else f"the file ends after {len(start)} bytes"


def is_safetensors(start: bytes) -> bool:
    """The length of a JSON header, eight bytes, and its first."""
    return len(start) > 8 and start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 1 << 40


def of_records(names: Iterable[str]) -> FileKind | None:
    """The kind of a zip archive by the names of its records; None for torch.save's, damaged or not."""
    found = set()
    num_names = num_arrays = 0
    for name in names:
        num_names += 1
        num_arrays += name.endswith(".npy")
        if name in _TELLING_NAMES:
            found.add(name)
        elif name.startswith(_STORAGES):
            found.add(_STORAGES)
    if CONSTANTS in found:
        return MOBILE if "bytecode.pkl" in found else TORCHSCRIPT
    if "data.pkl" in found:
        return None
    if found & _OF_PACKAGES:
        return PACKAGE
    if found & _OF_EXPORTED:
        return EXPORTED
    if found & _OF_TORCH_SAVE or num_names == 0:
        return None
    return NUMPY_ARCHIVE if num_names == num_arrays else PLAIN_ZIP


def of_refused_zip(start: bytes) -> FileKind | None:
    """The kind of a zip archive whose directory is not one that torch.save writes, as far as its beginning tells; None
    where it may be a damaged checkpoint."""
    nbytes = int.from_bytes(start[26:28], "little")
    name = start[_LOCAL_HEADER_NBYTES : _LOCAL_HEADER_NBYTES + nbytes]
    if not nbytes or len(name) < nbytes:
        return None
    _, folder, record = name.decode(errors="replace").partition("/")
    is_of_torch = record in _OF_TORCH_SAVE or record.startswith((_STORAGES, ".data/"))
    return None if folder and is_of_torch else PLAIN_ZIP
