"""The proof that the installed torch loads through our reader what it loads through its own."""

from __future__ import annotations

import io
from typing import Any

import torch

from ..installed import stock
from ..installed.proofs import LOADING, proof
from ..pickles.lean_pickle import LeanPickling
from ..pickles.unpickling import ReadBy, ZipReader, load_through
from .object_source import ObjectSource
from .readahead import ReadAhead
from .records import StoredRecords


@proof(LOADING)
def loads_like_torch(lean_pickle: LeanPickling) -> bool:
    """The proof that the installed torch's loading works with our reader: the same small object both ways."""
    from ..backends.python_reading import PythonOpenArchive

    base = torch.arange(1.0, 9.0, device="cpu")
    sample = {
        "a": base,
        "tail": base[4:],
        "p": torch.nn.Parameter(torch.ones(3, device="cpu")),
        "none": torch.empty(0, device="cpu"),
        "n": [1, "two"],
    }
    file = io.BytesIO()
    stock.torch_save(sample, file)
    for options in ({"weights_only": True}, {"weights_only": False}, {"map_location": lambda s, _: s}):
        records = StoredRecords(PythonOpenArchive(ObjectSource(io.BytesIO(file.getvalue())), "sample"), "sample")
        feed = ReadAhead(records, stay=True, verify=True, progress=None)
        reader = ZipReader(records, feed, lean_pickle=lean_pickle)
        file.seek(0)
        expected = stock.torch_load(file, **options)
        file.seek(0)
        found = load_through(ReadBy(reader))(file, **options)
        if not _alike(expected, found):
            return False
    return True


def _alike(expected: dict[str, Any], found: dict[str, Any]) -> bool:
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    return (
        list(expected) == list(found)
        and expected["n"] == found["n"]
        and all(type(found[name]) is type(expected[name]) for name in tensors)
        and all(torch.equal(found[name], expected[name]) for name in tensors)
        and found["a"].untyped_storage().data_ptr() == found["tail"].untyped_storage().data_ptr()
        and not found["a"].untyped_storage().resizable()
    )
