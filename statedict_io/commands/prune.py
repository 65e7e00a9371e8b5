"""``statedict-io prune DIR --keep-last N``."""

from __future__ import annotations

from typing import Any

from ..errors import CorruptCheckpointError
from .opened_directory import opened
from .printing import complain, nbytes_text, say


def run(path: str, pattern: str | None, *, dry_run: bool, **rules: Any) -> int:
    """Returns the exit code: 1 where no checkpoint is sound, and so none is deleted.

    Raises:
        OSError, StateDictIOError, ValueError: as of ``CheckpointDirectory``.
    """
    if all(rules[name] is None for name in ("keep_last", "keep_every", "keep_best")):
        raise ValueError("prune needs --keep-last, --keep-every or --keep-best")
    if rules["keep_best"] is not None and rules["best"] is None:
        raise ValueError("--keep-best needs --best min or --best max")
    with opened(path, pattern, **rules) as ckpts:
        there = {each.step: each for each in ckpts}
        sizes = {step: each.nbytes for step, each in there.items()}
        try:
            going = ckpts.prune(dry_run=dry_run)
        except CorruptCheckpointError as e:
            complain(str(e))
            return 1
    with opened(path, pattern) as ckpts:
        left = {each.step for each in ckpts}
    gone = [step for step in going if dry_run or step not in left]
    for step in gone:
        say(f"{there[step].path}: {'would be deleted' if dry_run else 'deleted'}")
    nbytes = nbytes_text(sum(sizes[step] for step in gone))
    say(f"{path}: {len(gone)} of {len(there)} checkpoints {'would go' if dry_run else 'are gone'}, {nbytes}")
    if len(gone) < len(going):
        complain(f"{path}: {len(going) - len(gone)} could not be deleted")
        return 2
    return 0
