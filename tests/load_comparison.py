"""sio.load beside torch.load, and archives as other writers would have written them."""

import traceback
import warnings
import zipfile

import torch
from equality import difference
from oracle import attempt

import statedict_io as sio


def storages_of(tensors):
    """Which tensors share memory with which: the first index of each address."""
    addresses = [t.untyped_storage()._cdata if isinstance(t, torch.Tensor) else None for t in tensors]
    return [addresses.index(address) for address in addresses]


def both(path, backend, **options):
    """Loads with torch and with ours and compares everything; returns torch's (result, error)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(torch.load, path, **options)  # torch says some things once a process
    with warnings.catch_warnings(record=True) as expected_warnings:
        warnings.simplefilter("always")
        expected, reference = attempt(torch.load, path, **options)
    with warnings.catch_warnings(record=True) as our_warnings:
        warnings.simplefilter("always")
        options.setdefault("weights_only", True)
        actual, error = attempt(sio.load, path, backend=backend, **options)
    if reference is not None:
        where = "".join(traceback.format_exception(error)) if error else "no error"
        if isinstance(error, sio.CorruptCheckpointError):
            assert isinstance(error, type(reference)), where
        else:
            assert type(error) is type(reference) and str(error) == str(reference), where
    else:
        assert error is None, "".join(traceback.format_exception(error))
        found = difference(expected, actual)
        assert found is None, found
    seen, ours = (
        [(w.category, str(w.message), w.filename) for w in record] for record in (expected_warnings, our_warnings)
    )
    assert ours == seen
    return expected, reference


def saved(path, make):
    """Saves a corpus object; of what torch.save refuses, what it leaves behind: an archive without data.pkl."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(torch.save, make(), path)
    return path


def rezipped(source, target, compression=zipfile.ZIP_STORED, *, replace=None, drop=(), order=lambda names: names):
    """The archive as another zip writer would write it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in order(old.namelist()):
            record = name.partition("/")[2]
            if record not in drop:
                new.writestr(name, (replace or {}).get(record, old.read(name)))
    return target


OTHER_WRITERS = {
    "stored": {},
    "deflated": {"compression": zipfile.ZIP_DEFLATED},
    "sorted": {"order": sorted},
    "reversed": {"order": lambda names: names[::-1]},
    "big endian": {"replace": {"byteorder": b"big"}},
    "as torch 1.6 to 2.0 wrote": {
        "drop": ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
    },
    "unknown byte order": {"replace": {"byteorder": b"middle"}},
}
