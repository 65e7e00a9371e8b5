"""``convert``: between ``.pt`` and ``.safetensors``, streaming: memory does not grow with the tensors."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization

from . import backends
from .backends import fallback, reproduction
from .backends.file_range import FileRange
from .backends.protocol import Contents
from .errors import FileKindError, StateDictIOError
from .formats import kinds, safetensors_format
from .installed import torch_format
from .pickles.pickling import pickle_object
from .progress import ProgressCallback
from .reading.lazy.checkpoint import Checkpoint, open_checkpoint
from .reading.lazy.strided_reads import memory_of
from .system.descriptors import open_file, read_at, write_all_at
from .untrusted.written_out import check_written_out
from .writing import stock_saves
from .writing.places import OpenFile, write_content, write_file
from .writing.targets import FileTarget, resolve

_BLOCK_NBYTES = 8 << 20
_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did."""

    num_tensors: int
    nbytes: int  #: of the tensors
    left_out: Sequence[str]  #: names of values that are no tensors, which safetensors cannot hold
    untied: list[str]  #: names of tensors that shared a record with one before, now written out
    metadata_left_out: list[str]  #: of a safetensors file; not "format", which says that torch wrote it


def convert(
    source: str,
    destination: str,
    *,
    weights_only: bool = True,
    progress: ProgressCallback | None = None,
    atomic: bool = True,
) -> Conversion:
    """Converts by the names' suffixes: one has to end in ``.safetensors``. The destination is replaced atomically.

    Args:
        source, destination: paths.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Use ``False`` only for what you
            trust.
        progress: called with (bytes_done, bytes_total).
        atomic: ``False`` writes into the destination itself, as for :func:`statedict_io.save`.

    Raises:
        OSError: what the system reported.
        ValueError: not one of the two names ends in ``.safetensors``, or the destination is no file.
        StateDictIOError: there are tensors that the other format cannot hold; names them.
        CorruptCheckpointError: the source is not sound.
        pickle.UnpicklingError: it needs a class that is refused; names it.
    """
    to_safetensors = destination.endswith(_SAFETENSORS)
    if to_safetensors == source.endswith(_SAFETENSORS):
        raise ValueError(f"one of the two names has to end in {_SAFETENSORS}: {source}, {destination}")
    target = resolve(destination, names_archive=not to_safetensors)
    if not isinstance(target, FileTarget):
        raise ValueError(f"{destination}: is no regular file, which convert needs to replace it as a whole")
    try:
        if not atomic and target.existing is not None and os.path.samestat(target.existing, os.stat(source)):
            raise ValueError(f"{destination}: is {source} under another name; it cannot be written in place")
        if to_safetensors:
            with open_checkpoint(source, weights_only=weights_only) as checkpoint:
                return _to_safetensors(checkpoint, target, progress, atomic)
        return _to_pt(source, target, progress, atomic)
    finally:
        target.close()


def _to_safetensors(
    checkpoint: Checkpoint, target: FileTarget, progress: ProgressCallback | None, atomic: bool
) -> Conversion:
    _check_can_be_held(checkpoint)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    names = safetensors_format.in_order((name, info.dtype) for name, info in infos.items())
    header = safetensors_format.header(
        ((name, infos[name].dtype, tuple(infos[name].shape)) for name in names), {"format": "pt"}
    )
    safetensors_format.check_header(header, checkpoint.path)
    total = sum(info.nbytes for info in infos.values())
    check_written_out(checkpoint.path, total, checkpoint.records.file_nbytes)

    def write(file: OpenFile) -> None:
        done = 0
        write_all_at(file.fd, header, 0)
        for name in names:
            for block in checkpoint.blocks(name, _BLOCK_NBYTES):
                plain = block.resolve_conj().resolve_neg().contiguous()
                write_all_at(file.fd, memory_of(plain), len(header) + done)
                done += plain.numel() * plain.element_size()
                if progress is not None:
                    progress(done, total)

    write_file(target, write, durable=True, atomic=atomic)
    seen: set[str | None] = set()
    untied = []
    for name in checkpoint:
        record = checkpoint.record(name)
        if record in seen:
            untied.append(name)
        seen.add(record)
    return Conversion(len(names), total, checkpoint.others, untied, [])


def _check_can_be_held(checkpoint: Checkpoint) -> None:
    if checkpoint.refused:  # there may be tensors in it
        name, needs = next(iter(checkpoint.refused.items()))
        more = f" and {len(checkpoint.refused) - 1} more" if len(checkpoint.refused) > 1 else ""
        raise pickle.UnpicklingError(
            f"{checkpoint.path}: {name!r}{more} cannot be converted: it needs {', '.join(needs)}, which torch's "
            "restricted unpickler refuses; if you trust the file, pass weights_only=False (`statedict-io convert "
            "--trust`)"
        )
    if checkpoint.hidden:
        shown = "; ".join(checkpoint.hidden[:8])
        more = f"; and {len(checkpoint.hidden) - 8} more" if len(checkpoint.hidden) > 8 else ""
        raise StateDictIOError(
            f"{checkpoint.path}: not all tensors can be converted: {shown}{more}; rename what is spelled alike, take "
            "tensors out of what is no mapping, list or tuple, and save it again"
        )
    for name in checkpoint:
        safetensors_format.check_name(name, checkpoint.path)
    wrong = [
        f"{name} ({checkpoint.info(name).dtype})" if checkpoint.record(name) else f"{name} (no plain tensor with data)"
        for name in checkpoint
        if checkpoint.record(name) is None or checkpoint.info(name).dtype not in safetensors_format.NAMES
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise StateDictIOError(
            f"{checkpoint.path}: safetensors cannot hold {', '.join(wrong[:8])}{more}; convert them to plain tensors "
            "of a dtype that it knows, and save that"
        )


def _to_pt(source: str, target: FileTarget, progress: ProgressCallback | None, atomic: bool) -> Conversion:
    fd = open_file(source, os.O_RDONLY)
    try:
        file_nbytes = os.fstat(fd).st_size
        _check_is_safetensors(read_at(fd, kinds.START_NBYTES, 0), source)
        tensors, metadata = safetensors_format.parse(
            lambda offset, nbytes: FileRange(fd, offset, nbytes, source).read(), file_nbytes, source
        )
        # Memory that is never touched: the pickler asks storages only for their sizes and addresses.
        memory = mmap.mmap(fd, file_nbytes, access=mmap.ACCESS_COPY)
        mapped = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        obj = {}
        ranges = {}
        for tensor in tensors:
            storage = mapped[tensor.begin : tensor.end]
            obj[tensor.name] = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
                storage, 0, tensor.shape, _contiguous_strides(tensor.shape)
            )
            ranges[storage._cdata] = FileRange(fd, tensor.begin, tensor.nbytes, source)
        left_out = [key for key, value in metadata.items() if (key, value) != ("format", "pt")]
        if backends.choose("python") is None:
            stock_saves.save_zip(obj, target, durable=True, atomic=atomic)
        else:
            _save(obj, lambda storage: ranges[storage._cdata], target, progress, atomic)
        return Conversion(len(tensors), sum(tensor.nbytes for tensor in tensors), [], [], left_out)
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = source
        raise
    finally:
        os.close(fd)


def _check_is_safetensors(start: bytes, source: str) -> None:
    if start.startswith(kinds.ZIP_START):
        raise FileKindError(f"{source}: is a zip archive, as torch.save writes them: give it a name that ends in .pt")
    kind = kinds.of_start(start, source)
    if kind not in (None, kinds.SAFETENSORS, kinds.UNKNOWN):
        raise FileKindError(f"{source}: {kind}")


def _save(
    obj: dict[str, torch.Tensor],
    range_of: Callable[[torch.UntypedStorage], FileRange],
    target: FileTarget,
    progress: ProgressCallback | None,
    atomic: bool,
) -> None:
    pickled = pickle_object(obj, pickle, torch.serialization.DEFAULT_PROTOCOL)
    alignment = torch_format.storage_alignment()
    contents = reproduction.contents(pickled, alignment)
    archive = fallback.plan(
        target.archive_name,
        Contents(contents.head, _Ranges([range_of(s) for s in pickled.table.storages]), contents.tail, False),
        alignment=alignment,
        compute_crc32=torch_format.compute_crc32(),
    )
    write_file(
        target,
        lambda file: write_content(archive, file, durable=True, progress=progress),
        durable=True,
        atomic=atomic,
    )


class _Ranges:
    """A storage table whose storages lie in a file."""

    def __init__(self, storages: list[FileRange]) -> None:
        self.storages: list[Any] = storages

    def key_of(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> str:
        raise NotImplementedError


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
