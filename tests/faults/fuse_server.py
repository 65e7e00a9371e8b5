"""A file system in memory, over /dev/fuse, that refuses what it is told to: mounts that no kernel driver gives.

    with fuse_server.mounted(directory, refuse={"rename": errno.ENOSYS}, in_order=True) as mount: ...

Speaks the kernel's protocol itself (include/uapi/linux/fuse.h, version 7.31), in a process of its own, which mounts and
unmounts: it ends when the test has ended, however that ends, and when it ends no call waits for it any longer. What is
refused answers with the errno given; "in_order" answers EINVAL to a write that does not begin where the file ends,
"mandatory" EACCES to one past another descriptor's lock; "ahead" are the seconds that its clock is ahead of ours.
Every request is counted, and the bytes written, in :meth:`Mount.counts`.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import os
import pathlib
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback

MAX_WRITE = 1 << 17
ROOT = 1
OPCODES = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename",
    14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 25: "flush", 26: "init",
    27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir", 32: "setlk", 33: "setlkw", 34: "access",
    35: "create", 36: "interrupt", 38: "destroy", 42: "batch_forget", 43: "fallocate", 45: "rename2",
}  # fmt: skip
NO_ANSWER = {"forget", "batch_forget", "interrupt", "destroy"}
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_MTIME, FATTR_MTIME_NOW = 1, 2, 4, 8, 1 << 5, 1 << 8
ATOMIC_O_TRUNC, BIG_WRITES, FLOCK_LOCKS = 1 << 3, 1 << 5, 1 << 10
MNT_DETACH = 2
MOUNTED = "mounted"


class Node:
    def __init__(self, mode):
        self.mode, self.uid, self.gid = mode, 0, 0
        self.data = bytearray()
        self.mtime = 0.0
        self.names = {}  # of a directory: name -> number
        self.locks = {}  # handle -> fcntl.F_RDLCK or F_WRLCK

    @property
    def is_directory(self):
        return stat.S_ISDIR(self.mode)


class Server:
    def __init__(self, fd, refuse, in_order, mandatory, ahead):
        self.fd, self.refuse, self.in_order, self.mandatory, self.ahead = fd, refuse, in_order, mandatory, ahead
        self.handles = itertools.count(1)
        self.nodes = {ROOT: Node(stat.S_IFDIR | 0o777)}
        self.next_node = ROOT + 1
        self.counts = {"bytes written": 0}

    def answer_counts(self):
        return self.counts.copy()

    def answer_give(self, name, uid):
        self.nodes[self.nodes[ROOT].names[name.encode()]].uid = uid

    def serve(self):
        while True:
            try:
                request = os.read(self.fd, MAX_WRITE + 4096)
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                if e.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, node, _, _, _, _ = struct.unpack_from("<IIQQIIII", request)
            name = OPCODES.get(opcode, str(opcode))
            self.counts[name] = self.counts.get(name, 0) + 1
            try:
                answer, error = self.handle(name, node, request[40:]), 0
            except OSError as e:
                answer, error = b"", e.errno
            if name not in NO_ANSWER:
                with contextlib.suppress(OSError):  # of a call that was interrupted
                    os.write(self.fd, struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer)

    def handle(self, name, node, body):
        if name in self.refuse:
            raise OSError(self.refuse[name], name)
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise OSError(errno.ENOSYS, name)
        return method(node, body)

    def attributes(self, number):
        node = self.nodes[number]
        size = len(node.data)
        seconds, nanoseconds = int(node.mtime // 1), int(node.mtime % 1 * 1e9)
        return struct.pack(
            "<QQQQQQIIIIIIIIII", number, size, (size + 511) // 512, 0, seconds, 0, 0, nanoseconds, 0,
            node.mode, 1, node.uid, node.gid, 0, 4096, 0,
        )  # fmt: skip

    def entry(self, number):
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + self.attributes(number)

    def find(self, parent, name):
        number = self.nodes[parent].names.get(name)
        if number is None:
            raise OSError(errno.ENOENT, "no such name")
        return number

    def make(self, parent, name, mode):
        if parent not in self.nodes or not self.nodes[parent].is_directory:
            raise OSError(errno.ENOENT, "no such directory")
        if name in self.nodes[parent].names:
            raise OSError(errno.EEXIST, "it exists")
        number, self.next_node = self.next_node, self.next_node + 1
        self.nodes[number] = Node(mode)
        self.nodes[number].mtime = self.now()
        self.nodes[parent].names[name] = number
        return number

    def now(self):
        return time.time() + self.ahead

    def do_init(self, _, body):
        _, minor, readahead, _ = struct.unpack_from("<IIII", body)
        flags = ATOMIC_O_TRUNC | BIG_WRITES | FLOCK_LOCKS
        return struct.pack("<IIIIHHIIHHI", 7, min(minor, 31), readahead, flags, 16, 12, MAX_WRITE, 1, 32, 0, 0) + bytes(
            28
        )

    def do_forget(self, *_):
        return b""

    do_batch_forget = do_interrupt = do_destroy = do_forget
    do_releasedir = do_flush = do_fsync = do_fsyncdir = do_access = do_forget

    def do_lookup(self, parent, body):
        return self.entry(self.find(parent, body.rstrip(b"\0")))

    def do_getattr(self, number, _):
        return struct.pack("<QII", 0, 0, 0) + self.attributes(number)

    def do_setattr(self, number, body):
        valid, _, _, size, _, _, mtime, _, _, nanoseconds, _, mode, _, uid, gid = struct.unpack_from(
            "<IIQQQQQQIIIIIII", body
        )
        node = self.nodes[number]
        for bit, what in ((FATTR_SIZE, "truncate"), (FATTR_MODE, "chmod"), (FATTR_UID | FATTR_GID, "chown")):
            if valid & bit:
                self.counts[what] = self.counts.get(what, 0) + 1
                if what in self.refuse:
                    raise OSError(self.refuse[what], what)
        if valid & FATTR_SIZE:
            node.data = node.data[:size] + bytes(max(0, size - len(node.data)))
        if valid & (FATTR_MTIME | FATTR_MTIME_NOW):
            node.mtime = self.now() if valid & FATTR_MTIME_NOW else mtime + nanoseconds / 1e9
        if valid & FATTR_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        node.uid = uid if valid & FATTR_UID else node.uid
        node.gid = gid if valid & FATTR_GID else node.gid
        return self.do_getattr(number, b"")

    def do_mkdir(self, parent, body):
        mode, _ = struct.unpack_from("<II", body)
        return self.entry(self.make(parent, body[8:].rstrip(b"\0"), stat.S_IFDIR | mode))

    def do_create(self, parent, body):
        flags, mode, _, _ = struct.unpack_from("<IIII", body)
        self.check_access(flags)
        number = self.make(parent, body[16:].rstrip(b"\0"), stat.S_IFREG | stat.S_IMODE(mode))
        return self.entry(number) + struct.pack("<QII", next(self.handles), 0, 0)

    def check_access(self, flags):
        if flags & os.O_ACCMODE == os.O_RDWR and "read and write" in self.refuse:
            raise OSError(self.refuse["read and write"], "O_RDWR")

    def do_open(self, number, body):
        (flags,) = struct.unpack_from("<I", body)
        self.check_access(flags)
        if flags & os.O_TRUNC:
            self.nodes[number].data = bytearray()
        return struct.pack("<QII", next(self.handles), 0, 0)

    def do_opendir(self, *_):
        return struct.pack("<QII", next(self.handles), 0, 0)

    def do_release(self, number, body):
        (handle,) = struct.unpack_from("<Q", body)
        self.nodes[number].locks.pop(handle, None)
        return b""

    def do_setlk(self, number, body):
        handle, _, _, _, kind, _ = struct.unpack_from("<QQQQII", body)
        locks = self.nodes[number].locks
        others = [of for by, of in locks.items() if by != handle]
        if fcntl.F_WRLCK in others or (others and kind == fcntl.F_WRLCK):
            raise OSError(errno.EAGAIN, "locked")
        locks.pop(handle, None)
        if kind != fcntl.F_UNLCK:
            locks[handle] = kind
        return b""

    do_setlkw = do_setlk

    def do_read(self, number, body):
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(self.nodes[number].data[offset : offset + size])

    def do_write(self, number, body):
        handle, offset, size = struct.unpack_from("<QQI", body)
        data, file = body[40 : 40 + size], self.nodes[number].data
        if self.mandatory and self.nodes[number].locks.keys() - {handle}:
            raise OSError(errno.EACCES, "locked")
        if self.in_order and offset != len(file):
            raise OSError(errno.EINVAL, "out of order")
        if len(file) < offset:
            file.extend(bytes(offset - len(file)))
        file[offset : offset + size] = data
        self.nodes[number].mtime = self.now()
        self.counts["bytes written"] += size
        return struct.pack("<II", size, 0)

    def do_fallocate(self, number, body):
        _, offset, length, _, _ = struct.unpack_from("<QQQII", body)
        file = self.nodes[number].data
        file.extend(bytes(max(0, offset + length - len(file))))
        return b""

    def do_readdir(self, number, body):
        _, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        for i, (name, inner) in enumerate(list(self.nodes[number].names.items())[offset:], offset + 1):
            record = struct.pack("<QQII", inner, i, len(name), 0) + name
            record += bytes(-len(record) % 8)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    def do_unlink(self, parent, body):
        self.find(parent, body.rstrip(b"\0"))
        del self.nodes[parent].names[body.rstrip(b"\0")]
        return b""

    do_rmdir = do_unlink

    def do_rename(self, parent, body):
        return self.move(parent, struct.unpack_from("<Q", body)[0], body[8:])

    def do_rename2(self, parent, body):
        if "rename" in self.refuse:
            raise OSError(self.refuse["rename"], "rename")
        return self.move(parent, struct.unpack_from("<Q", body)[0], body[16:])

    def move(self, parent, new_parent, names):
        old, new = names.rstrip(b"\0").split(b"\0")
        number = self.find(parent, old)
        del self.nodes[parent].names[old]
        self.nodes[new_parent].names[new] = number
        return b""

    def do_statfs(self, *_):
        return struct.pack("<QQQQQIIII", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0) + bytes(24)


class Mount:
    def __init__(self, path, server):
        self.path = path
        self._server = server

    def counts(self):
        """Requests since the mount, by name; and "bytes written"."""
        return self._ask("counts")

    def give(self, name, uid):
        """Makes the file `name`, at the top, another's, whatever is refused."""
        self._ask("give", name, uid)

    def kill(self):
        self._server.kill()
        self._server.wait()

    def _ask(self, *command):
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@contextlib.contextmanager
def mounted(directory, *, refuse=None, in_order=False, mandatory=False, ahead=0):
    """A file system at `directory`, which is made, in the block. Skips where there can be none, or fails where it is
    promised."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    options = [refuse or {}, in_order, mandatory, ahead]
    command = [sys.executable, __file__, str(directory), *map(json.dumps, options)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "LD_PRELOAD": ""}
    )
    answer = ""
    try:
        answer = server.stdout.readline().strip()
        if answer != MOUNTED:
            _unusable(answer or "the server did not start")
        yield Mount(directory, server)
    finally:
        with contextlib.suppress(OSError):
            server.stdin.close()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()
        if answer == MOUNTED:
            _unmount(directory)  # what is left of it where the server was killed


def _unusable(reason):
    import pytest  # not in the server
    from conftest import promised

    if promised("STATEDICT_IO_REQUIRE_FUSE"):
        pytest.fail(f"STATEDICT_IO_REQUIRE_FUSE=1, but {reason}")
    pytest.skip(reason)


def _mount(directory):
    """The descriptor of /dev/fuse through which requests for `directory` come.

    Raises:
        OSError: there can be none here.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40777,user_id=0,group_id=0,default_permissions,allow_other"
    if _libc.mount(b"sdio-test", os.fsencode(directory), b"fuse", 0, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), directory)
    return fd


def _unmount(directory):
    """At once, whoever still uses it; nothing where nothing is mounted."""
    _libc.umount2(os.fsencode(directory), MNT_DETACH)


def main(directory, *options):
    try:
        server = Server(_mount(directory), *map(json.loads, options))
    except (OSError, AttributeError) as e:
        print(f"a file system in user space cannot be mounted: {e}", flush=True)
        return
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    print(MOUNTED, flush=True)
    for line in sys.stdin:  # until the test has closed it
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(server, f"answer_{command}")(*arguments)), flush=True)
    _unmount(directory)


def _serve(server):
    try:
        server.serve()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # which ends the calls that wait for an answer


_libc = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
