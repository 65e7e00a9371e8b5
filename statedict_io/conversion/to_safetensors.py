"""From a checkpoint of any kind to ``.safetensors``, block by block."""

from __future__ import annotations

import pickle
from collections.abc import Hashable, Iterator, Mapping

from ..backends.payloads import Value
from ..backends.python import PythonFile
from ..errors import StateDictIOError
from ..formats import safetensors_format
from ..progress import ProgressCallback
from ..reading.lazy.checkpoint import Checkpoint, TensorInfo
from ..system.file_digest import FileDigest
from ..untrusted.limits import listed
from ..untrusted.written_out import check_written_out, untied
from ..writing.saving import PlannedSave, write_planned
from ..writing.targets import FileTarget, URLTarget
from .outcome import Conversion
from .streamed_tensor import StreamedTensor


def to_safetensors(
    checkpoint: Checkpoint,
    target: FileTarget | URLTarget,
    progress: ProgressCallback | None,
    atomic: bool,
    digest: FileDigest | None,
) -> Conversion:
    infos = holdable(checkpoint)
    content = content_of(checkpoint, infos, {"format": "pt", **checkpoint.metadata}, checkpoint.path)
    report = Reports(checkpoint, content.nbytes, progress)
    checkpoint.check(report.checked)
    write_planned(PlannedSave(target, content), durable=True, progress=report.written, atomic=atomic, digest=digest)
    return outcome(checkpoint, infos, {} if digest is None else {target.file_name: digest.hexdigest()})


def outcome(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], sums: Mapping[str, str]) -> Conversion:
    nbytes = sum(info.nbytes for info in infos.values())
    return Conversion(len(infos), nbytes, checkpoint.others, untied(shared_by(checkpoint)), [], sums)


class Reports:
    """The progress of reading a checkpoint once for its checksums, and of writing what it becomes."""

    def __init__(self, checkpoint: Checkpoint, nbytes: int, progress: ProgressCallback | None) -> None:
        self._before = checkpoint.nbytes
        self._total = checkpoint.nbytes + nbytes
        self._progress = progress

    def checked(self, done: int, _total: int) -> None:
        self._report(min(done, self._before))

    def written(self, done: int, _total: int) -> None:
        self._report(self._before + done)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)


def content_of(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], metadata: dict[str, str], path: str
) -> PythonFile:
    """A safetensors file.

    Args:
        infos: of the tensors that are in it.
        path: for messages.
    """
    shapes = {name: (info.dtype, tuple(info.shape)) for name, info in infos.items()}
    header, names = safetensors_format.planned(shapes, metadata, path)
    parts: list[Value] = [header, *(StreamedTensor(checkpoint, name, infos[name].nbytes) for name in names)]
    return PythonFile(parts)


def holdable(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, none of which safetensors files cannot hold.

    Raises:
        StateDictIOError: there are others; names them. Or written out they take much more than the file.
    """
    _check_can_be_held(checkpoint)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    check_written_out(checkpoint.path, sum(info.nbytes for info in infos.values()), checkpoint.nbytes)
    return infos


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
