"""From a checkpoint of ``torch.save`` to ``.safetensors``, block by block."""

from __future__ import annotations

import pickle
from collections.abc import Hashable, Iterator

from ..backends.payloads import Value
from ..backends.python import PythonFile
from ..errors import StateDictIOError
from ..formats import safetensors_format
from ..progress import ProgressCallback
from ..reading.lazy.checkpoint import Checkpoint
from ..untrusted.limits import listed
from ..untrusted.written_out import check_written_out, untied
from ..writing.places import write_content, write_file
from ..writing.targets import FileTarget
from .outcome import Conversion
from .streamed_tensor import StreamedTensor


def to_safetensors(
    checkpoint: Checkpoint, target: FileTarget, progress: ProgressCallback | None, atomic: bool
) -> Conversion:
    _check_can_be_held(checkpoint)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    header, names = safetensors_format.planned(
        {name: (info.dtype, tuple(info.shape)) for name, info in infos.items()}, {"format": "pt"}, checkpoint.path
    )
    total = sum(info.nbytes for info in infos.values())
    check_written_out(checkpoint.path, total, checkpoint.nbytes)
    file_nbytes = checkpoint.nbytes

    def report(done: int) -> None:
        """Of reading everything once and writing it."""
        if progress is not None:
            progress(done, file_nbytes + len(header) + total)

    checkpoint.check(lambda done, _: report(min(done, file_nbytes)))

    parts: list[Value] = [header, *(StreamedTensor(checkpoint, name, infos[name].nbytes) for name in names)]
    content = PythonFile(parts)
    write_file(
        target,
        lambda file: write_content(content, file, durable=True, progress=lambda done, _: report(file_nbytes + done)),
        durable=True,
        atomic=atomic,
    )
    shared = untied(shared_by(checkpoint))
    return Conversion(len(names), total, checkpoint.others, shared, [])


def shared_by(checkpoint: Checkpoint) -> Iterator[tuple[str, Hashable]]:
    """(name, what tells the record that its tensor lives in)."""
    for name in checkpoint:
        info, record = checkpoint.info(name), checkpoint.record(name)
        yield name, name if record is None else (info.path, record)


def check_none_refused(checkpoint: Checkpoint) -> None:
    """Raises where something of it cannot be had here: there may be tensors in it."""
    refused = checkpoint.refused
    if not refused:
        return
    name, needs = next(iter(refused.items()))
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    problem = f"{checkpoint.path}: {name!r}{more} cannot be converted: it needs {', '.join(needs)}"
    if checkpoint.stored_object is None:
        raise StateDictIOError(problem)
    raise pickle.UnpicklingError(
        f"{problem}, which torch's restricted unpickler refuses; if you trust the file, pass weights_only=False "
        "(`statedict-io convert --trust`)"
    )


def _check_can_be_held(checkpoint: Checkpoint) -> None:
    check_none_refused(checkpoint)
    if checkpoint.hidden:
        raise StateDictIOError(
            f"{checkpoint.path}: not all tensors can be converted: {listed(checkpoint.hidden)}; rename what is spelled "
            "alike, take tensors out of what is no mapping, list or tuple, and save it again"
        )
    for name in checkpoint:
        safetensors_format.check_name(name, checkpoint.path)
    wrong = [f"{name} (no plain tensor with data)" for name in checkpoint if not checkpoint.is_plain(name)]
    dtypes = {name: checkpoint.info(name).dtype for name in checkpoint}
    wrong += [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in safetensors_format.NAMES]
    if wrong:
        raise StateDictIOError(
            f"{checkpoint.path}: safetensors cannot hold {listed(wrong)}; convert them to plain tensors "
            "of a dtype that it knows, and save that"
        )
