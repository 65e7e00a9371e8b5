"""Which version of the file all ranks of a load read, where another process saves to it meanwhile.

Each rank opens the file by itself, before DCP lets it talk to others, and keeps it open; the versions travel in DCP's
own messages. See docs/distributed.md, "A file that is replaced meanwhile".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

from torch.distributed.checkpoint.planner import LoadPlan

from ..reading.lazy.lazy_file import FileVersion, LazyFile


@dataclasses.dataclass(frozen=True)
class OpenedVersion:
    """What a rank has opened; travels as ``LoadPlan.storage_data`` to the coordinator."""

    version: FileVersion
    mtime_ns: int
    machine: str  #: processes of one machine see each other's descriptors; "" where none does
    descriptor_path: str  #: names the open file, for other processes of that machine


class OpenDescriptor(NamedTuple):
    machine: str
    descriptor_path: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """What all ranks read; travels as ``LoadPlan.storage_data`` from the coordinator."""

    version: FileVersion
    descriptors: tuple[OpenDescriptor, ...] = ()  #: where it is open, one a machine; empty where all ranks have it
    keeps_open: bool = False  #: the rank's own is one of them

    def ways(self, path: str) -> Iterator[str]:
        """Paths under which another process may open that version, most likely first."""
        yield path
        yield from (each.descriptor_path for each in self.descriptors if each.machine == _machine())


def described(file: LazyFile) -> OpenedVersion:
    """``file``, which has to stay open."""
    records = file.records
    descriptor_path = f"/proc/{os.getpid()}/fd/{records.descriptor}" if records.descriptor is not None else ""
    return OpenedVersion(file.version, records.mtime_ns or 0, _machine(), descriptor_path)


def with_choices(plans: list[LoadPlan]) -> list[LoadPlan]:
    """All ranks' plans, which have :class:`OpenedVersion`, with what to read: the newest version that any rank has
    opened. A rank that was too early finds it under the file's path, or, where it has been replaced too, open in
    another process.

    Raises:
        ValueError: the planner has dropped what a plan had.
    """
    opened = []
    for plan in plans:
        if not isinstance(plan.storage_data, OpenedVersion):
            raise ValueError(_DROPPED)
        opened.append(plan.storage_data)
    newest = max(opened, key=lambda each: each.mtime_ns).version
    if all(each.version == newest for each in opened):
        return [dataclasses.replace(plan, storage_data=Choice(newest)) for plan in plans]
    holders: dict[str, int] = {}  # machine -> rank
    for rank, each in enumerate(opened):
        if each.version == newest and each.machine and each.descriptor_path:
            holders.setdefault(each.machine, rank)
    descriptors = tuple(OpenDescriptor(machine, opened[rank].descriptor_path) for machine, rank in holders.items())
    return [
        dataclasses.replace(plan, storage_data=Choice(newest, descriptors, rank in holders.values()))
        for rank, plan in enumerate(plans)
    ]


def choice_of(plan: LoadPlan) -> Choice:
    """
    Raises:
        ValueError: the planner has dropped it.
    """
    if not isinstance(plan.storage_data, Choice):
        raise ValueError(_DROPPED)
    return plan.storage_data


_DROPPED = (
    "the planner drops LoadPlan.storage_data, by which ranks tell each other which version of the file they read: make "
    "its plans with dataclasses.replace(plan, items=...)"
)


@functools.cache
def _machine() -> str:
    """Processes for which it is the same can open each other's descriptors by their paths, if they may; "" where there
    is no such path."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{boot_id.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
