"""The records of an archive as the installed torch would have them, and the proof that a backend reproduces its format.

The proof compares a small archive with what the installed ``torch.save`` writes. A torch whose format differs in one
byte makes every save go to that ``torch.save``.
"""

from __future__ import annotations

import pickle

import torch
import torch.serialization

from ..installed.proofs import FORMAT, proof
from ..installed.torch_format import format_records, sample, sample_object, skip_data
from ..pickles.pickling import PickledObject, pickle_object
from .protocol import Backend, Records


def records(pickled: PickledObject, alignment: int, *, disable_byteorder_record: bool = False) -> Records:
    """What the installed torch would put into the archive, under its current settings."""
    head, tail = format_records(alignment, disable_byteorder_record)
    return Records([("data.pkl", pickled.data_pkl), *head], pickled.table, [*tail], skip_data())


@proof(FORMAT)
def reproduced_by(backend: Backend) -> bool:
    """Whether ``backend`` writes the bytes of the installed torch's format."""
    expected = sample()
    protocol = torch.serialization.DEFAULT_PROTOCOL
    pickled = pickle_object(sample_object(), pickle, protocol, backend.native_tables())
    planned = backend.plan(
        "archive",
        records(pickled, expected.alignment),
        alignment=expected.alignment,
        compute_crc32=expected.compute_crc32,
    )
    ours = bytearray()
    planned.write_stream(ours.extend, progress=None)
    return ours == expected.archive
