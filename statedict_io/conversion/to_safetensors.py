"""From a checkpoint of ``torch.save`` to ``.safetensors``, block by block."""

from __future__ import annotations

import pickle

from ..errors import StateDictIOError
from ..formats import safetensors_format
from ..progress import ProgressCallback
from ..reading.lazy.checkpoint import Checkpoint
from ..reading.lazy.strided_reads import memory_of
from ..reading.verification import check_all
from ..system.descriptors import write_all_at
from ..untrusted.limits import listed
from ..untrusted.written_out import check_written_out, untied
from ..writing.places import OpenFile, write_file
from ..writing.targets import FileTarget
from .outcome import Conversion

_BLOCK_NBYTES = 8 << 20


def to_safetensors(
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
    file_nbytes = checkpoint.records.file_nbytes

    def report(done: int) -> None:
        """Of reading everything once and writing it."""
        if progress is not None:
            progress(done, file_nbytes + total)

    check_all(checkpoint.records, lambda done, _: report(min(done, file_nbytes)))

    def write(file: OpenFile) -> None:
        done = 0
        write_all_at(file.fd, header, 0)
        for name in names:
            for block in checkpoint.blocks(name, _BLOCK_NBYTES):
                plain = block.resolve_conj().resolve_neg().contiguous()
                write_all_at(file.fd, memory_of(plain), len(header) + done)
                done += plain.numel() * plain.element_size()
                report(file_nbytes + done)

    write_file(target, write, durable=True, atomic=atomic)
    shared = untied((name, checkpoint.record(name)) for name in checkpoint)
    return Conversion(len(names), total, checkpoint.others, shared, [])


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
        raise StateDictIOError(
            f"{checkpoint.path}: not all tensors can be converted: {listed(checkpoint.hidden)}; rename what is spelled "
            "alike, take tensors out of what is no mapping, list or tuple, and save it again"
        )
    for name in checkpoint:
        safetensors_format.check_name(name, checkpoint.path)
    wrong = [
        f"{name} ({checkpoint.info(name).dtype})" if checkpoint.record(name) else f"{name} (no plain tensor with data)"
        for name in checkpoint
        if checkpoint.record(name) is None or checkpoint.info(name).dtype not in safetensors_format.NAMES
    ]
    if wrong:
        raise StateDictIOError(
            f"{checkpoint.path}: safetensors cannot hold {listed(wrong)}; convert them to plain tensors "
            "of a dtype that it knows, and save that"
        )
