"""``progress=``: None, True or a callable, as one callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .untrusted.escaping import escaped

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
    """Yields a callback or None. ``True`` shows a bar on stderr, closed at the end."""
    if not progress:
        return _NO_CALLBACK
    return _bar(description) if progress is True else nullcontext(progress)


@contextmanager
def _bar(description: str) -> Iterator[ProgressCallback]:
    with _tqdm()(desc=escaped(description), unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def update(bytes_done: int, bytes_total: int) -> None:
            bar.total = bytes_total
            bar.update(bytes_done - bar.n)

        yield update


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'statedict-io[progress]'") from None
    return tqdm
