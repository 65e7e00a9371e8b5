"""``diff``: which tensors of two checkpoints differ. They go by in blocks: memory does not grow with them."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ... import progress as progress_module
from ...errors import StateDictIOError
from ...installed.stock import torch_save
from ...progress import Progress, ProgressCallback
from ...untrusted.limits import listed
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint

_BLOCK_NBYTES = 8 << 20
# More threads read no faster, and the allocator keeps memory for each.
_NUM_THREADS = 2
# Of each checkpoint, read while a block is compared.
_AHEAD_NBYTES = 16 << 20
_MOST_AHEAD = 64  # blocks
_AT_ONCE = 1 << 18  # elements of which differences are computed
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both checkpoints."""

    name: str
    #: "missing" in one of them; of another "kind" (such as sparse), "dtype" or "shape"; or other "values"
    what: Literal["missing", "kind", "dtype", "shape", "values"]
    a: TensorInfo | None  #: None: it is missing there
    b: TensorInfo | None
    num_different: int | None = None  #: elements with other values; like the two that follow None where not compared
    max_abs: float | None = None  #: the largest of ``|a - b|``; inf where one of both is NaN
    max_rel: float | None = None  #: the largest of ``|a - b| / max(|a|, |b|)``


@dataclass(frozen=True)
class Differences:
    """What :func:`diff` found."""

    num_compared: int  #: tensors that both have
    differences: Sequence[TensorDifference]  #: in the order of the first checkpoint, then those that only the other has

    @property
    def equal(self) -> bool:
        return not self.differences


def diff(a: Any, b: Any, *, weights_only: bool = True, backend: str = "auto", progress: Progress = None) -> Differences:
    """Compares the tensors of two checkpoints, by name. Values that are not tensors, and metadata, are not compared.

    Elements are equal if they are numerically, or both NaN. Strides, and which tensors share memory, do not matter.

    Args:
        a, b: each as for :func:`open_checkpoint`; they may be of different kinds.
        weights_only, backend: as for :func:`open_checkpoint`.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).

    Raises:
        StateDictIOError: one has tensors without a name of their own, or values that torch's restricted unpickler
            refuses, in which there may be tensors.
        Exception: what :func:`open_checkpoint` raises, and reading a tensor.

    Example:
        >>> sio.save({"w": torch.tensor([1.0, 2.0])}, "a.pt")
        >>> sio.save({"w": torch.tensor([1.0, 2.5])}, "b.pt")
        >>> sio.diff("a.pt", "b.pt").differences[0].max_abs
        0.5
    """
    progress_module.check(progress)
    options: dict[str, Any] = {"weights_only": weights_only, "backend": backend}
    with (
        progress_module.reporting(progress, "diff") as callback,
        open_checkpoint(a, **options) as first,
        open_checkpoint(b, **options) as second,
        ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="statedict_io-diff") as pool,
    ):
        for checkpoint in (first, second):
            _check_complete(checkpoint)
        return _Comparison(first, second, pool, callback).run()


def _check_complete(checkpoint: Checkpoint) -> None:
    if checkpoint.refused:
        name, needs = next(iter(checkpoint.refused.items()))
        raise StateDictIOError(
            f"{checkpoint.path}: cannot be compared: {name!r} needs {', '.join(needs)}; if you trust the file, pass "
            "weights_only=False (`statedict-io diff --trust`)"
        )
    if checkpoint.hidden:
        raise StateDictIOError(f"{checkpoint.path}: not all tensors can be compared: {listed(checkpoint.hidden)}")


class _Comparison:
    def __init__(
        self, a: Checkpoint, b: Checkpoint, pool: ThreadPoolExecutor, progress: ProgressCallback | None
    ) -> None:
        self._a, self._b, self._pool, self._progress = a, b, pool, progress
        self._done = 0
        self._total = 0

    def run(self) -> Differences:
        a, b = self._a, self._b
        common = [name for name in a if name in b]
        self._total = sum(a.info(name).nbytes for name in common)
        found: dict[str, TensorDifference] = {}
        alike = []
        for name in common:
            what = self._unlike(name)
            if what is not None:
                found[name] = TensorDifference(name, what, a.info(name), b.info(name))
            elif a.is_plain(name):
                alike.append(name)
            else:
                if _as_saved(a[name]) != _as_saved(b[name]):
                    found[name] = TensorDifference(name, "values", a.info(name), b.info(name))
                self._report(a.info(name).nbytes)
        for name, values in self._values(alike).items():
            if values.num_different:
                numbers = (values.num_different, values.max_abs, values.max_rel)
                found[name] = TensorDifference(name, "values", a.info(name), b.info(name), *numbers)
        if self._progress is not None:
            self._progress(self._total, self._total)
        found |= {name: TensorDifference(name, "missing", a.info(name), None) for name in a if name not in b}
        only_b = [TensorDifference(name, "missing", None, b.info(name)) for name in b if name not in a]
        return Differences(len(common), [*(found[name] for name in a if name in found), *only_b])

    def _unlike(self, name: str) -> Literal["kind", "dtype", "shape"] | None:
        a, b = self._a.info(name), self._b.info(name)
        if self._a.is_plain(name) != self._b.is_plain(name):
            return "kind"
        if a.dtype != b.dtype:
            return "dtype"
        return "shape" if a.shape != b.shape else None

    def _values(self, names: Sequence[str]) -> dict[str, _Values]:
        """Of those that have elements. What is read ahead may be of several tensors."""
        found: dict[str, _Values] = {}
        blocks = self._blocks(names)
        ahead: collections.deque[_Block] = collections.deque()
        ahead_nbytes = 0
        try:
            while True:
                while ahead_nbytes < _AHEAD_NBYTES and len(ahead) < _MOST_AHEAD:
                    block = next(blocks, None)
                    if block is None:
                        break
                    ahead.append(block)
                    ahead_nbytes += block.nbytes
                if not ahead:
                    return found
                block = ahead.popleft()
                ahead_nbytes -= block.nbytes
                first, second = (future.result() for future in block.futures)
                found.setdefault(block.name, _Values()).add(first, second)
                self._report(block.nbytes)
        finally:
            for block in ahead:
                for future in block.futures:
                    future.cancel()

    def _blocks(self, names: Sequence[str]) -> Iterator[_Block]:
        for name in names:
            info = self._a.info(name)
            sources = [checkpoint.get_slice(name) for checkpoint in (self._a, self._b)]
            is_read_whole = any(checkpoint.is_read_whole(name) for checkpoint in (self._a, self._b))
            parts = [((...,), info.nbytes)] if is_read_whole else _parts(info.shape, info.dtype.itemsize)
            for index, nbytes in parts:
                yield _Block(name, nbytes, [self._pool.submit(source.__getitem__, index) for source in sources])

    def _report(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Block(NamedTuple):
    """The same part of a tensor in both, as it is being read."""

    name: str
    nbytes: int
    futures: list[Future[torch.Tensor]]


def _parts(shape: Sequence[int], itemsize: int) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Indices of parts in row-major order, and the bytes of each, which are no more than ``_BLOCK_NBYTES``."""
    nbytes = itemsize
    for size in shape:
        nbytes *= size
    if nbytes == 0:
        return
    pending: list[tuple[tuple[Any, ...], Sequence[int], int]] = [((), shape, nbytes)]
    while pending:
        index, left, nbytes = pending.pop()
        if nbytes <= _BLOCK_NBYTES or not left:
            yield index, nbytes
            continue
        of_row = nbytes // left[0]
        if of_row > _BLOCK_NBYTES:
            pending += [((*index, row), left[1:], of_row) for row in reversed(range(left[0]))]
        else:
            step = _BLOCK_NBYTES // of_row
            for begin in range(0, left[0], step):
                yield (*index, slice(begin, begin + step)), of_row * min(step, left[0] - begin)


class _Values:
    """How far the elements of two tensors are apart, block by block."""

    def __init__(self) -> None:
        self.num_different = 0
        self.max_abs: float | None = None
        self.max_rel: float | None = None

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        a, b = (tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for tensor in (first, second))
        as_bits = _BITS.get(a.element_size(), a.dtype)
        if torch.equal(a.view(as_bits), b.view(as_bits)):
            return
        for at in range(0, a.numel(), _AT_ONCE):
            self._add(a[at : at + _AT_ONCE], b[at : at + _AT_ONCE], as_bits)

    def _add(self, a: torch.Tensor, b: torch.Tensor, as_bits: torch.dtype) -> None:
        apart = (a.view(as_bits) != b.view(as_bits)).nonzero().reshape(-1)
        a, b = (tensor.view(as_bits)[apart].view(tensor.dtype) for tensor in (a, b))
        if a.dtype in _WITHOUT_NUMBERS:
            self.num_different += apart.numel()
            return
        wide = torch.complex128 if a.dtype.is_complex else torch.float64
        is_exact = not (a.dtype.is_floating_point or a.dtype.is_complex)
        a, b = a.to(wide), b.to(wide)
        if not is_exact:
            different = ~((a == b) | (a.isnan() & b.isnan()))
            a, b = a[different], b[different]
        self.num_different += a.numel()
        if not a.numel():
            return
        infinite = float("inf")
        distance = (a - b).abs().nan_to_num(nan=infinite, posinf=infinite)
        scale = torch.maximum(a.abs(), b.abs())
        relative = (distance / scale).nan_to_num(nan=infinite, posinf=infinite)
        self.max_abs = max(self.max_abs or 0.0, float(distance.max()))
        self.max_rel = max(self.max_rel or 0.0, float(relative.max()))


# Whose elements torch makes no numbers of.
_WITHOUT_NUMBERS = {getattr(torch, "float4_e2m1fn_x2", None)}


def _as_saved(tensor: torch.Tensor) -> bytes:
    """What ``torch.save`` makes of a tensor of a kind that is not plain."""
    file = io.BytesIO()
    torch_save(tensor, file)
    return file.getvalue()
