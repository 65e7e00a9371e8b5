"""Many ranks: the first one keeps the directory, and all do and find the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ..dcp import SingleFileWriter
from ..errors import StateDictIOError
from .writer import Announced, Writer

T = TypeVar("T")


def save(
    writer: Writer,
    announce: Callable[[], tuple[Announced, bool]],
    state: Any,
    process_group: Any,
    digest: str | None,
    options: dict[str, Any],
) -> None:
    """A save of all ranks into one file. ``announce`` is called in the first.

    Raises:
        Exception: what ``announce`` raises; what ``torch.distributed.checkpoint.save`` raises where a rank has failed.
    """
    announced, durable = of_first(announce, process_group)
    is_first = _is_first(process_group)
    try:
        dcp.save(state, storage_writer=SingleFileWriter(announced.path, **options), process_group=process_group)
    except BaseException:
        if is_first:
            writer.failed(announced)
        raise
    if is_first:
        sha256 = None if digest is None else lambda: writer.read_sha256(announced)
        writer.committed(announced, durable=durable, sha256=sha256)


def of_first(action: Callable[[], T], process_group: Any) -> T:
    """What ``action`` returns in the first rank, in all of them; what it raises there, all raise."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None]
    own: Exception | None = None
    if _is_first(process_group):
        try:
            outcome[0] = (action(), None)
        except Exception as e:
            own, outcome[0] = e, (None, _as_message(e))
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    dist.broadcast_object_list(outcome, src=source, group=process_group)
    result, error = outcome[0]
    if own is not None:
        raise own
    if error is not None:
        raise error
    answer: T = result
    return answer


def in_all(action: Callable[[], T], process_group: Any) -> T:
    """What ``action`` returns; where it raises in one rank, it raises in all, each its own error or the first one's."""
    if not dist.is_initialized():
        return action()
    own: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as e:
        own = e
    errors: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(errors, None if own is None else _as_message(own), group=process_group)
    for error in (own, *errors):
        if error is not None:
            raise error
    answer: T = result
    return answer


def _is_first(process_group: Any) -> bool:
    return not dist.is_initialized() or dist.get_rank(process_group) == 0


def _as_message(error: Exception) -> Exception:
    """``error``, or what says the same where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return StateDictIOError(f"{type(error).__name__}: {error}")
