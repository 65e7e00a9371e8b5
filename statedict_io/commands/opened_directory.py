"""The directory that a command is given."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoints.checkpoint_directory import CheckpointDirectory
from ..errors import CheckpointDirectoryWarning
from .printing import complain


@contextmanager
def opened(path: str, pattern: str | None, **rules: Any) -> Iterator[CheckpointDirectory]:
    """Its warnings become complaints.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the pattern or a rule cannot be.
    """
    options = rules if pattern is None else {**rules, "pattern": pattern}
    with warnings.catch_warnings(), CheckpointDirectory(path, **options) as ckpts:
        if "://" not in ckpts.path and not os.path.exists(ckpts.path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        warnings.simplefilter("always", CheckpointDirectoryWarning)
        show = warnings.showwarning

        def complain_or_show(message: Any, category: Any, *others: Any, **options: Any) -> None:
            if issubclass(category, CheckpointDirectoryWarning):
                complain(str(message))
            else:
                show(message, category, *others, **options)

        warnings.showwarning = complain_or_show
        yield ckpts
