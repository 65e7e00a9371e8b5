"""A model of power loss: what a disk may hold after a recorded sequence of calls is cut off at some point.

Only what an fsync covered is certain. Of the rest - writes, truncations, names - any subset may have reached the disk,
a write also in part; a rename can be there before the data of the file that it names. An fsync of the file makes data
certain, an fsync of its directory a name. The one thing taken for granted is that a rename happens whole or not at all,
as every journaling file system gives it.
"""

import itertools
import os
import random
from dataclasses import dataclass, field

NONE, ALL, HALF = range(3)
MOST_STATES_A_PREFIX = 300


@dataclass(eq=False)
class Operation:
    """Something that a crash can undo until an fsync covers it."""

    kind: str  # write, resize, name, unname, rename
    inode: int
    paths: tuple[str, ...] = ()
    offset: int = 0
    data: bytes = b""
    nbytes: int = 0

    @property
    def options(self):
        return (NONE, ALL, HALF) if self.kind == "write" and len(self.data) > 1 else (NONE, ALL)


@dataclass(eq=False)
class Flush:
    """Makes the operations before it on an inode, or in a directory, or (neither) all of them, certain."""

    inode: int | None = None
    directory: str | None = None

    def covers(self, operation):
        if self.inode is None and self.directory is None:
            return True
        if operation.kind in ("write", "resize"):
            return operation.inode == self.inode
        return self.directory is not None and os.path.dirname(operation.paths[-1]) == self.directory


@dataclass
class History:
    """The calls of a save, as operations and flushes; inode 0 is the file that was there before, -1, -2, ... those of
    other names."""

    target: str
    steps: list = field(default_factory=list)
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, events, target, others=()):
        history, open_files, next_inode = cls(target, others=others), {}, itertools.count(1)
        names = {path: -i for i, path in enumerate((target, *others))}
        for event in events:
            if event.error or (event.result < 0 and event.call != "close"):
                continue
            base = open_files.get(event.fd, (None, ""))[1]
            path = os.path.join(base, event.path) if event.call.endswith("at") else event.path
            add = history.steps.append
            if event.call in ("open", "openat"):
                if path not in names and event.offset & os.O_CREAT:
                    names[path] = next(next_inode)
                    add(Operation("name", names[path], (path,)))
                elif event.offset & os.O_TRUNC and path in names:
                    add(Operation("resize", names[path]))
                open_files[event.result] = (names.get(path), path)
            elif event.call == "close":
                open_files.pop(event.fd, None)
            elif event.call in ("write", "writev", "pwrite", "pwritev"):
                add(Operation("write", open_files[event.fd][0], offset=event.offset, data=event.data))
            elif event.call in ("ftruncate", "fallocate", "posix_fallocate"):
                add(Operation("resize", open_files[event.fd][0], nbytes=event.offset + event.nbytes))
            elif event.call in ("fsync", "fdatasync"):
                inode, opened = open_files[event.fd]
                add(Flush(directory=opened) if inode is None else Flush(inode))
            elif event.call == "sync":
                add(Flush())
            elif event.call in ("renameat", "rename"):
                to = os.path.join(open_files.get(event.fd2, (None, ""))[1], event.path2)
                names[to] = names.pop(path)
                add(Operation("rename", names[to], (path, to)))
            elif event.call in ("unlinkat", "unlink") and path in names:
                add(Operation("unname", names.pop(path), (path,)))
        return history

    def without(self, doomed):
        """The history of a save that forgot the steps for which `doomed` is true."""
        return History(self.target, [step for step in self.steps if not doomed(step)], self.others)

    def states(self, num_steps, chance):
        """What the disk may hold after the first steps: each operation and how much of it is there."""
        done = self.steps[:num_steps]
        pending = [
            step
            for i, step in enumerate(done)
            if isinstance(step, Operation)
            and not any(isinstance(later, Flush) and later.covers(step) for later in done[i:])
        ]
        number = 1
        for operation in pending:
            number *= len(operation.options)
        if number <= MOST_STATES_A_PREFIX:
            choices = itertools.product(*(operation.options for operation in pending))
        else:
            everything = [ALL] * len(pending)
            choices = [everything, [NONE] * len(pending)]
            for i in range(len(pending)):
                choices.append([*everything[:i], NONE, *everything[i + 1 :]])
            while len(choices) < MOST_STATES_A_PREFIX:
                choices.append([chance.choice(operation.options) for operation in pending])
        for chosen in choices:
            fate = dict(zip(pending, chosen, strict=True))
            yield [(step, fate.get(step, ALL)) for step in done if isinstance(step, Operation)]

    def contents(self, state, before):
        """Of all files in a state, by their names; `before`: those before the save."""
        return {path: content_of(changes, before) for path, changes in self.changes(state, before).items()}

    def changes(self, state, before):
        """What each file is made of, by its name: the path that its old content had, or None, and what has been done
        to that. Equal for equal contents."""
        inodes = {path: -i for i, path in enumerate((self.target, *self.others))}
        paths = {inode: path for path, inode in inodes.items()}
        names = {path: inodes[path] for path in before}
        done = {}
        for operation, fate in state:
            if fate == NONE:
                continue
            if operation.kind == "name":
                names[operation.paths[0]] = operation.inode
            elif operation.kind == "unname":
                names.pop(operation.paths[0], None)
            elif operation.kind == "rename":
                names.pop(operation.paths[0], None)
                names[operation.paths[1]] = operation.inode
            else:
                done.setdefault(operation.inode, []).append((operation, fate))
        return {path: (paths.get(inode), tuple(done.get(inode, ()))) for path, inode in names.items()}


def content_of(changes, before):
    """The bytes of a file, from what :meth:`History.changes` says of it; `before`: contents by their paths."""
    path, done = changes
    content = bytearray(before.get(path, b""))
    for operation, fate in done:
        if operation.kind == "resize":
            del content[operation.nbytes :]
            content.extend(bytes(operation.nbytes - len(content)))
        else:
            data = operation.data if fate == ALL else operation.data[: len(operation.data) // 2]
            content.extend(bytes(max(0, operation.offset + len(data) - len(content))))
            content[operation.offset : operation.offset + len(data)] = data
    return bytes(content)


@dataclass
class Verdict:
    prefixes: int = 0
    states: int = 0
    violations: int = 0
    lost_after_return: int = 0


def examine(history, before, after, *, seed=0, first_violation_only=False):
    """Cuts the power after every step, in every way (or many ways, where there are too many)."""
    chance, verdict = random.Random(seed), Verdict()
    files = {} if before is None else {history.target: before}
    known = {
        None: (before is None, False)
    }  # by what the file is made of: whether it is the old or new one, the new one
    for num_steps in range(len(history.steps) + 1):
        verdict.prefixes += 1
        for state in history.states(num_steps, chance):
            verdict.states += 1
            changes = history.changes(state, files).get(history.target)
            if changes not in known:
                found = content_of(changes, files)
                known[changes] = (found in (before, after), found == after)
            is_sound, is_new = known[changes]
            verdict.violations += not is_sound
            verdict.lost_after_return += num_steps == len(history.steps) and not is_new
            if first_violation_only and verdict.violations:
                return verdict
    return verdict
