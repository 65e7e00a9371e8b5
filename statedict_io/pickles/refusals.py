"""What torch's restricted unpickler refuses, in words that name the class and what its users can do here."""

from __future__ import annotations

import pickle
import re


def refusal(path: str, error: pickle.UnpicklingError, cure: str) -> pickle.UnpicklingError:
    """The error to raise for ``error``, which the restricted unpickler or ``torch.load`` raised.

    Args:
        path: of the file.
        cure: what to do with a file that is trusted, in the imperative.
    """
    # torch.load raises another error in its place, with advice about its own options.
    cause = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    reason = str(cause)
    needed = re.search(r"\bGLOBAL (\S+)", reason)
    if needed is not None:
        problem = f"it needs {needed[1]}, which torch's restricted unpickler refuses"
    else:
        problem = f"torch's restricted unpickler refuses it: {reason.partition('. ')[0].rstrip('.')}"
    return pickle.UnpicklingError(f"{path}: {problem}; if you trust the file, {cure}")


def without_frames(error: BaseException) -> BaseException:
    """``error`` with no traceback, nor the errors it followed on: their frames hold all that had been unpickled."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
