"""What calls on one file take, of CPU time and memory, in a process that they may end.

Run as a program it takes a job a line from stdin, a JSON list of a path, a backend or STOCK, a directory for what is
written, and names of ACTIONS. It answers each call with its outcome, a JSON list.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import NamedTuple

CPU_SECONDS = 5
SPARE_NBYTES = 64 << 20
#: what a call may take at all before it is ended, whatever is allowed
ADDRESS_SPACE_NBYTES = 3 << 30
STOCK = "stock torch.load"


class Outcome(NamedTuple):
    action: str
    result: str  #: "ok", names of the classes of an error joined with spaces, or "killed by" a signal
    text: str  #: of the error, cut
    text_length: int
    grown_nbytes: int  #: the most resident memory while it ran, beyond what there was before; 0 where it was killed
    cpu_s: float


def stock_load(path, backend, directory):
    del backend, directory
    import torch

    torch.load(path)


def load(path, backend, directory):
    del directory
    import statedict_io as sio

    sio.load(path, backend=backend)


def verify(path, backend, directory):
    del directory
    import statedict_io as sio

    report = sio.verify(path, backend=backend)
    return sum(record.status == "ok" for record in report.records), sum(map(len, report.problems))


def open_checkpoint(path, backend, directory):
    del directory
    import statedict_io as sio

    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        for name, _ in zip(checkpoint, range(20), strict=False):
            checkpoint.info(name)
            checkpoint.get_slice(name)[...]
            checkpoint[name].shape  # noqa: B018
        return len(checkpoint), len(checkpoint.others), checkpoint.others[:8]


def inspect(path, backend, directory):
    del backend, directory
    from statedict_io.commands import inspect

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        inspect.run(path, as_json=False)


def to_safetensors(path, backend, directory):
    del backend
    from statedict_io.conversion import convert

    convert(path, os.path.join(directory, "x.safetensors"))


def to_directory(path, backend, directory):
    from statedict_io.dcp.conversion import file_to_dcp

    file_to_dcp(path, os.path.join(directory, "dcp"), backend=backend)


def from_safetensors(path, backend, directory):
    del backend
    from statedict_io.conversion import convert

    convert(path, os.path.join(directory, "x.pt"))


#: by the suffix of the file: (path, backend, directory for what is written) -> anything
ACTIONS = {
    ".pt": [load, verify, open_checkpoint, inspect, to_safetensors, to_directory],
    ".safetensors": [load, verify, open_checkpoint, inspect, from_safetensors],
}


#: These choose the backend themselves.
WITHOUT_A_CHOICE = [inspect, to_safetensors, from_safetensors]


def actions(path, backend):
    return [stock_load] if backend == STOCK else ACTIONS[os.path.splitext(path)[1]]


def measured(action, path, backend, directory):
    """The outcome of one call in this process; a signal ends it when it takes too long."""
    libc.malloc_trim(0)
    before = cpu_seconds()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    # Whole seconds: it may take up to one more.
    resource.setrlimit(resource.RLIMIT_CPU, (int(before) + CPU_SECONDS + 1, most))
    start_nbytes = restart_peak()
    error = None
    try:
        action(path, backend, directory)
    except Exception as e:
        error = e
    grown_nbytes = resident("VmHWM") - start_nbytes
    cpu_s = cpu_seconds() - before
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    kinds, text = "ok", ""
    if error is not None:
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        text = str(error)
    return Outcome(action.__name__, kinds, text[:500], len(text), grown_nbytes, cpu_s)


def cpu_seconds():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def restart_peak():
    """The resident memory now, from which on VmHWM is the most that there was."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


def limit_address_space():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE_NBYTES, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Calls:
    """Makes calls in a process, and goes on in another one where a call ends that. To be closed."""

    def __init__(self, python_path=None):
        root = pathlib.Path(__file__).resolve().parents[1]
        self._environment = {**os.environ, "PYTHONPATH": python_path or os.environ.get("PYTHONPATH") or str(root)}
        self._process = None

    def outcomes(self, path, backend, without=()):
        """Of all that can be done to the file by a backend, or by STOCK, but for actions in ``without``."""
        found = []
        names = [action.__name__ for action in actions(str(path), backend) if action not in without]
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as directory:
            while left := names[len(found) :]:
                found += self._some(str(path), backend, directory, left)
        return found

    def _some(self, path, backend, directory, names):
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        self._process.stdin.write(json.dumps([path, backend, directory, names]) + "\n")
        self._process.stdin.flush()
        for name in names:
            line = self._process.stdout.readline()
            if line:
                yield Outcome(*json.loads(line))
                continue
            status = self.close()
            if status >= 0:
                raise RuntimeError(f"{name}: the process ended with {status}")
            yield Outcome(name, f"killed by {signal.Signals(-status).name}", "", 0, 0, 0.0)
            return

    def allowed_nbytes(self, path):
        """What a call may take of memory for a file, by what torch.load takes for it in the same process."""
        (stock,) = self.outcomes(path, STOCK)
        return os.path.getsize(path) + SPARE_NBYTES + stock.grown_nbytes

    def close(self):
        """The status of the process, negative where a signal ended it."""
        if self._process is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        status = self._process.wait(60)
        self._process = None
        return status


def in_child(work):
    """``work(write)`` in a forked child. Returns the lines that it wrote, and the signal that ended it or 0."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with os.fdopen(writer, "w") as file:

                def write(line):
                    file.write(line + "\n")
                    file.flush()

                work(write)
            status = 0
        except BaseException as error:
            sys.stderr.write(f"in a child: {error!r}\n")
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        lines = file.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the child failed, see above")
    return lines, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def warm_up(backend, directory):
    """All is imported, proven and allocated that any first call takes."""
    import torch

    sound = os.path.join(directory, "sound.pt")
    if not os.path.exists(sound):
        tensors = {"a": torch.ones(3), "b": [torch.ones(2, 3)[:, 1:], 1]}
        torch.save(tensors, sound)
        from statedict_io.conversion import convert

        convert(sound, os.path.join(directory, "sound.safetensors"))
    for suffix in (".pt", ".safetensors"):
        for action in actions(f"sound{suffix}", backend):
            action(os.path.join(directory, f"sound{suffix}"), backend, directory)
        if backend == STOCK:
            break


def prepare():
    """In a process that will fork: imports are made, threads are not."""
    global libc
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed.checkpoint

    import statedict_io.commands.inspect
    import statedict_io.conversion
    import statedict_io.dcp.conversion  # noqa: F401

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)


def main():
    prepare()
    warm = set()
    for line in sys.stdin:
        path, backend, directory, names = json.loads(line)
        if backend not in warm:
            warm_up(backend, directory)
            warm.add(backend)
            limit_address_space()
        for action in actions(path, backend):
            if action.__name__ in names:
                print(json.dumps(measured(action, path, backend, directory)), flush=True)


if __name__ == "__main__":
    main()
