"""The ways in which a save is written; each owes its caller the same."""

import contextlib
import io
from unittest import mock

import torch

import statedict_io as sio
from statedict_io import backends

OPTIONS = {
    "native": {"backend": "native"},
    "torch": {"backend": "torch"},
    "legacy": {"_use_new_zipfile_serialization": False},
    "stock": {},
}


@contextlib.contextmanager
def options_for(way):
    """The options that make ``sio.save`` take a way in the block; "stock" is that of a torch of unknown format."""
    unknown = mock.patch.object(backends, "choose", lambda wish: None)
    with unknown if way == "stock" else contextlib.nullcontext():
        yield OPTIONS[way]


def save(path, obj=None, **options):
    """Not durable, and something small where nothing is given: for tests of what happens beside the file."""
    sio.save({"weight": torch.ones(3)} if obj is None else obj, path, durable=False, **options)


#: ways of writing another format, each with its backend; what they save is a dict of tensors
SAFETENSORS = {"safetensors": "native", "safetensors_torch": "torch"}


def save_in(way, obj, path, **options):
    if way in SAFETENSORS:
        sio.save_safetensors(obj, path, backend=SAFETENSORS[way], **options)
        return
    with options_for(way) as own:
        sio.save(obj, path, **own, **options)


def loaded(way, content):
    """What was saved, from the bytes of the file."""
    if way not in SAFETENSORS:
        return torch.load(io.BytesIO(content))
    from safetensors.torch import load

    return load(content)
