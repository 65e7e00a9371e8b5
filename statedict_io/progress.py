"""``progress=``: None, True or a callable, as one callable."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

#: called with (bytes_done, bytes_total)
ProgressCallback = Callable[[int, int], Any]
Progress = bool | ProgressCallback | None


_NO_CALLBACK: AbstractContextManager[ProgressCallback | None] = nullcontext()


def check(progress: Any) -> None:
    """Raises what :func:`reporting` would, before there is anything to report."""
    if progress is True:
        _tqdm()
    elif progress is not None and progress is not False and not callable(progress):
        raise TypeError(f"progress must be None, True or a callable taking (bytes_done, bytes_total), got {progress!r}")


def reporting(progress: Progress, description: str) -> AbstractContextManager[ProgressCallback | None]:
    """Yields a callback or None. ``True`` shows a bar on stderr from the first report to the end.

    An OSError that the callback raises is not the system's answer about a file: nobody in the block sees it as one, and
    it leaves the block as it was raised.
    """
    if not progress:
        return _NO_CALLBACK
    return _bar(description) if progress is True else _guarded(progress)


class _Raised(BaseException):
    """Carries an OSError past those who handle the system's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _guarded(progress: ProgressCallback) -> Iterator[ProgressCallback]:
    def report(bytes_done: int, bytes_total: int) -> None:
        try:
            progress(bytes_done, bytes_total)
        except OSError as e:
            raise _Raised(e) from None

    try:
        yield report
        return
    except _Raised as raised:
        error = raised.error
    raise error


@contextmanager
def _bar(description: str) -> Iterator[ProgressCallback]:
    from .untrusted.escaping import escaped

    tqdm = _tqdm()
    with ExitStack() as end:
        bar: Any = None

        def update(bytes_done: int, bytes_total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = end.enter_context(tqdm(desc=escaped(description), unit="B", unit_scale=True, unit_divisor=1024))
            bar.total = bytes_total
            bar.update(bytes_done - bar.n)

        yield end.enter_context(_guarded(update))


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'statedict-io[progress]'") from None
    return tqdm


def over_parts(progress: ProgressCallback | None, sizes: Sequence[int]) -> list[ProgressCallback | None]:
    """What reports the progress of each part of something, where all parts together have ``sizes``."""
    if progress is None:
        return [None] * len(sizes)
    before = [0, *itertools.accumulate(sizes)]
    return [functools.partial(_report_part, progress, *part, before[-1]) for part in zip(before, sizes, strict=False)]


def _report_part(progress: ProgressCallback, before: int, nbytes: int, total: int, done: int, part: int) -> None:
    progress(before + (nbytes * min(done, part) // part if part else nbytes), total)
