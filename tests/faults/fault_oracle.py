"""What a save owes its caller when one of its calls fails."""

import errno
import os
from dataclasses import dataclass

from faults.preload import AFTERWARDS, FOREVER, SHORT

#: the errors that each call is made to give; the default suite takes the first ones
ANY = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EINTR)
WRITES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.EINVAL, errno.EINTR, errno.EPERM)
ERRORS = {
    "open": (*ANY, errno.ENOENT, errno.ENFILE, errno.ELOOP),
    "openat": (*ANY, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENFILE, errno.ENAMETOOLONG, errno.EEXIST),
    "mkdir": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMLINK, errno.ESTALE, errno.EROFS),
    "close": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR),
    "read": (errno.EIO, errno.ESRCH, errno.EINTR),
    "write": WRITES,
    "pwrite": WRITES,
    "pwritev": WRITES,
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR, errno.EINVAL, errno.ENOTSUP),
    "ftruncate": (errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EPERM, errno.EINTR),
    "fallocate": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
                  errno.EINTR),
    "renameat": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EXDEV, errno.ESTALE,
                 errno.EBUSY, errno.EINTR),
    "linkat": (errno.EIO, errno.EPERM, errno.EMLINK, errno.ENOSPC, errno.EDQUOT, errno.EXDEV),
    "fcntl": (errno.EINVAL, errno.EIO, errno.EMFILE),
    "flock": (errno.ENOLCK, errno.EWOULDBLOCK, errno.ENOSYS, errno.EBADF, errno.EIO, errno.EINTR),
    "fstat": (errno.EIO, errno.ESTALE, errno.EOVERFLOW),
    "fchown": (errno.EPERM, errno.EIO, errno.EDQUOT, errno.EINVAL, errno.EINTR, errno.EOVERFLOW),
    "fchmod": (errno.EPERM, errno.EIO, errno.EINTR),
    "stat": (errno.EIO, errno.EACCES, errno.ESTALE),
    "faccessat": (errno.EIO, errno.EACCES, errno.ESTALE),
    "readlink": (errno.EIO, errno.EACCES, errno.ESTALE),
    "lseek": (errno.EIO, errno.ESPIPE),
    "pthread_create": (errno.EAGAIN,),
}  # fmt: skip
ERRORS["posix_fallocate"] = ERRORS["fallocate"]
OTHERS = (errno.EIO, errno.EACCES, errno.ESTALE)
MOST_TELLING = 3  # errors of each call in the default suite, and EINTR and EINVAL where it can give them
PERMILLES = (0, 1, 500, 999)  # of a write that stops short
RETRIED = {"open", "openat", "read", "write", "pwrite", "pwritev", "fsync", "ftruncate", "fallocate", "posix_fallocate",
           "fchmod", "fchown"}  # fmt: skip
REFUSES_PREALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
#: rename and its like may have happened although the answer got lost
CAN_FAIL_AFTERWARDS = {"renameat", "fsync", "unlinkat", "unlink", "rmdir", "openat", "mkdir", "ftruncate"}


@dataclass(frozen=True)
class Fault:
    call: str
    first: int
    last: int
    error: int  # permille written, for SHORT
    how: int

    def __str__(self):
        what = f"{self.error}/1000 written" if self.how == SHORT else errno.errorcode[self.error]
        times = {self.first: "", FOREVER: "+"}.get(self.last, f"-{self.last}")
        return f"{self.call} #{self.first}{times}: {what}{' after doing it' if self.how == AFTERWARDS else ''}"

    @property
    def persistent(self):
        return self.last == FOREVER


def faults_of(call, occurrence, *, exhaustive):
    """Every fault of one call of a save."""
    errors = ERRORS.get(call, OTHERS)
    if not exhaustive:
        errors = tuple(e for i, e in enumerate(errors) if i < MOST_TELLING or e in (errno.EINTR, errno.EINVAL))
    for error in errors:
        yield Fault(call, occurrence, occurrence, error, 0)
        # A call that never ends in anything but EINTR is retried for ever, as PEP 475 wants.
        yield Fault(call, occurrence, occurrence + 5 if error == errno.EINTR else FOREVER, error, 0)
    if call in CAN_FAIL_AFTERWARDS:
        yield Fault(call, occurrence, occurrence, errno.EIO, AFTERWARDS)
    if call in ("pwrite", "pwritev", "write"):
        for permille in PERMILLES:
            if call != "write" or permille == 500:
                yield Fault(call, occurrence, occurrence, permille, SHORT)
                yield Fault(call, occurrence, occurrence + 5 if permille else FOREVER, permille, SHORT)


@dataclass(frozen=True)
class Step:
    """A call in its place in a save."""

    event: object
    occurrence: int
    stage: str
    target: str


def steps_of(events, target, *, overwrite):
    """The calls of an undisturbed save, each with its stage: open directory, resolve, create, try lock, clean, write,
    commit, rename, settle."""
    counts, steps, stage, locked, listed, leftovers = {}, [], "open directory", False, False, set()
    # A file that is replaced hands on its owner and mode: the commit begins with a look at the temporary's.
    renamed = next(i for i, event in enumerate(events) if event.call == "renameat")
    looks = [event for event in events[:renamed] if event.call == "fstat"][-1:] if overwrite else []
    for event in events:
        counts[event.call] = counts.get(event.call, 0) + 1
        of_temporary = event.path.endswith("sdio-tmp")
        if stage == "open directory" and steps:
            stage = "resolve"
        if stage == "resolve" and event.call == "openat" and of_temporary:
            stage = "create"
        elif stage in ("create", "try lock") and event.call in (
            "fcntl",
            "fdopendir",
        ):  # a list of the directory's names
            stage = "clean"
        elif stage == "create" and locked:  # whether others can write past it
            stage = "try lock"
        elif stage == "clean" and listed:
            if not of_temporary and event.fd not in leftovers:
                stage = "write"
            elif event.call in ("openat", "fcntl"):
                leftovers.add(event.result)
        elif stage == "write" and any(event is look for look in looks):
            stage = "commit"
        elif stage in ("write", "commit") and event.call == "renameat":
            stage = "rename"
        elif stage == "rename":
            stage = "settle"
        locked = locked or event.call == "flock"
        listed = listed or event.call == "closedir"
        steps.append(Step(event, counts[event.call], stage, target))
    return steps


SAVED, REFUSED = "saved", "refused"


def allowed(step, fault, *, stock):
    """The outcomes that are right: SAVED, REFUSED or both. `REFUSED` is an OSError with the fault's errno."""
    call, error, stage = fault.call, fault.error, step.stage
    if stage in ("try lock", "clean"):
        return {SAVED}
    if fault.how == SHORT:
        # Nothing written and no error: once is odd, for ever is a disk that does not answer.
        return {SAVED} if error else {REFUSED} if fault.persistent else {SAVED, REFUSED}
    if stock and stage == "write" and call in ("unlink", "rmdir"):
        return {SAVED}  # of a private file: it stays
    if fault.how == AFTERWARDS:
        return {SAVED} if stage == "settle" and call == "unlinkat" else {REFUSED}
    if error == errno.EINTR and call in RETRIED:
        return {SAVED}
    if stage == "resolve":
        # fstatat: of the target. faccessat: if it fails, the later open decides. pthread_create: of an asynchronous
        # save's thread, without which the call writes.
        return {SAVED} if call in ("faccessat", "pthread_create") else {REFUSED}
    if call in ("fallocate", "posix_fallocate") and error in REFUSES_PREALLOCATION:
        return {SAVED}
    if call in ("fcntl", "flock", "statx", "pthread_create"):
        return {SAVED}
    if call in ("pwrite", "pwritev") and error == errno.EINVAL:
        return {SAVED}  # a mount that takes no writes but in order: with write(), then
    if call == "fchown" and error in (errno.EPERM, errno.EINVAL, errno.EOVERFLOW):
        return {SAVED}
    if call == "fchmod" and error == errno.EPERM:
        return {SAVED}
    if call == "fsync" and error in (errno.EINVAL, errno.ENOTSUP):
        return {SAVED}
    if call == "openat" and error == errno.EEXIST:
        return {REFUSED} if fault.persistent else {SAVED}
    is_directory = stage == "open directory" or "statedict_io-" in os.path.basename(step.event.path)
    if call == "open" and error == errno.EACCES and is_directory:  # again, with O_PATH
        return {SAVED} if not fault.persistent else {REFUSED}
    if stage == "settle":
        return {REFUSED} if call == "fsync" else {SAVED}
    if stock and stage == "write" and call in ("lseek", "fstat", "close", "write", "writev"):
        return {SAVED, REFUSED}  # of libstdc++'s file stream, which asks and does not always listen
    if stock and stage == "write" and call == "stat":
        return {SAVED}  # "does this path lead to the temporary?", without which the bytes are copied
    if stock and stage == "write" and call == "open" and step.event.path.endswith("sdio-tmp"):
        return {REFUSED} if fault.persistent else {SAVED}  # the same, and then of the private file
    if stage == "write" and call == "fstat":
        return {SAVED}  # "has it its length already?"
    if call == "fstatat" and step.event.path.endswith(".sha256") and error == errno.EACCES:
        return {SAVED}  # a sum beside the file that is not for us to read
    return {REFUSED}


def decisive(steps, step, fault, **how):
    """(the step that decides, outcomes that are right): a fault that stays meets the later calls of its kind too."""
    if fault.last == fault.first:
        return step, allowed(step, fault, **how)
    right, decides = set(), step
    for later in steps:
        if later.event.call == fault.call and fault.first <= later.occurrence <= fault.last:
            outcomes = allowed(later, fault, **how)
            if outcomes == {REFUSED}:
                return later, outcomes if right <= {SAVED} else {REFUSED, *right}
            right |= outcomes
    return decides, right


def expected_errno(step, fault):
    """What the OSError must say."""
    if fault.how == SHORT:
        return errno.EIO
    return fault.error


def leaves_temporary(fault):
    """Whether what failed is the removal itself."""
    return fault.call in ("unlinkat", "unlink", "rmdir") or (
        fault.call in ("openat", "mkdir") and fault.how == AFTERWARDS
    )
