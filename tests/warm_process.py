"""Runs scripts as ``python script.py arguments`` does, in processes forked from one that has imported torch.

Importing it takes seconds, and hundreds of tests need a process of their own. What happens there from the first line of
the script to the end of the interpreter is that process's own: nothing has been saved or loaded before, and no thread
runs. A script that must see the import itself, or needs a library or a limit before it, is started by subprocess.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import types


def run(
    script, *arguments, timeout, imported=("statedict_io",), environment=None, preloaded="", closed=(), stdout=None
):
    """What ``subprocess.run([python, script, ...], capture_output=True, text=True)`` returns.

    Args:
        script: path of the script.
        timeout: seconds after which the process is killed and :class:`subprocess.TimeoutExpired` raised.
        imported: modules that it has imported; there is a server for each choice.
        environment: its environment variables; those of this process if None.
        preloaded: what it was started with as LD_PRELOAD, if not empty; there is a server for each.
        stdout: a descriptor for what it prints; if None that is returned.
        closed: descriptors, of 0 to 2, that are closed in it.
    """
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as stderr, open(os.devnull, "rb") as stdin:
        request = {
            "command": command,
            "directory": os.getcwd(),
            "environment": dict(os.environ if environment is None else environment),
            "closed": list(closed),
        }
        server = _server(os.getpid(), imported, preloaded)
        descriptors = [stdin.fileno(), printed.fileno() if stdout is None else stdout, stderr.fileno()]
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], descriptors)
        child = int(_line(server))
        server.settimeout(timeout)
        try:
            status = int(_line(server))
        except TimeoutError:
            os.killpg(child, signal.SIGKILL)
            server.settimeout(60)
            _line(server)
            raise subprocess.TimeoutExpired(command, timeout, _text(printed), _text(stderr)) from None
        finally:
            server.settimeout(60)
        return subprocess.CompletedProcess(command, status, _text(printed), _text(stderr))


def _text(file):
    file.seek(0)
    return file.read().decode()


@functools.cache
def _server(process, imported, preloaded):
    """A connection to the server of ``process``: this one, which may have been forked."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno()), *imported]
        served = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            cwd=pathlib.Path(__file__).parent.parent,
            env={**os.environ, "LD_PRELOAD": preloaded} if preloaded else None,
        )
    atexit.register(_end, process, ours, served)
    ours.settimeout(300)
    assert _line(ours) == "ready"
    ours.settimeout(60)
    return ours


def _end(process, connection, served):
    if os.getpid() == process:
        connection.close()
        served.wait()


def _line(connection):
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            raise EOFError("the server of processes has ended")
        line += more
    return line.decode().strip()


def _serve(connection):
    """Returns (request, descriptors) in each process that is forked for one, and None in the server at its end."""
    connection.sendall(b"ready\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if not message:
            return None
        while not message.endswith(b"\n"):
            message += connection.recv(1 << 16)
        child = os.fork()
        if child == 0:
            os.setsid()
            connection.close()
            return json.loads(message), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(request, descriptors):
    """This process is as one that was just started with the request's command."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in request["closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    script = request["command"][0]
    sys.argv = request["command"]
    paths = [os.path.dirname(script), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0] = paths
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    return main


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collecting what is imported at the end of each process would take most of its time
    served = _serve(socket.socket(fileno=int(sys.argv[1])))
    if served is not None:
        main = _become(*served)
        with open(main.__file__, "rb") as source:
            code = compile(source.read(), main.__file__, "exec")
        exec(code, main.__dict__)
