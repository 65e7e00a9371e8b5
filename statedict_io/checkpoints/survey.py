"""What is in a folder, sorted by what it is to us."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..writing.temporary_names import target_of
from . import facts, links
from .folder import Folder, Listed
from .naming import Pattern


@dataclass(frozen=True)
class Survey:
    checkpoints: dict[int, Listed] = field(default_factory=dict)  #: by step, ascending; also what only has such a name
    facts: set[str] = field(default_factory=set)  #: names of files of facts
    temporaries: dict[str, str] = field(default_factory=dict)  #: of a checkpoint, of its facts or of a link -> its name


def survey(folder: Folder, pattern: Pattern) -> Survey:
    """
    Raises:
        OSError: the folder is there and cannot be listed.
    """
    checkpoints: list[tuple[int, Listed]] = []
    names_of_facts, temporaries = set(), {}
    for listed in folder.listed():
        name = listed.name
        if (step := pattern.step_of(name)) is not None:
            checkpoints.append((step, listed))
        elif name.endswith(facts.SUFFIX) and pattern.step_of(name.removesuffix(facts.SUFFIX)) is not None:
            names_of_facts.add(name)
        elif (target := target_of(name)) is not None and (ours := _ours(target, pattern)) is not None:
            temporaries[name] = ours
    checkpoints.sort(key=lambda found: found[0])
    return Survey(dict(checkpoints), names_of_facts, temporaries)


def _ours(target: str, pattern: Pattern) -> str | None:
    """What a temporary was to become, if it has to do with a checkpoint. torch's are named after the archive, which
    has no suffix."""
    suffix = os.path.splitext(pattern.text)[1]
    for name in (target.removesuffix(facts.SUFFIX), target + suffix):
        if name in (links.LATEST, links.BEST) or pattern.step_of(name) is not None:
            return name
    return None
