"""Children that are forked to be killed, and one that looks on meanwhile."""

import os
import signal
import sys


def forked(action):
    """The id of a child that does `action` and nothing else."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as e:  # the parent is to hear of it
            print(repr(e), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def wait_until_killed(child, how):
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{how}: ended with {status}"


class Onlooker:
    """Until its block ends, a child takes one number after the other from `looks`, a generator that only the child
    starts. None may be less than the one before. Then `num_looks` says how many there were.
    """

    def __init__(self, looks):
        self._report, report = os.pipe()
        self._child = forked(lambda: _look_on(looks, report))
        os.close(report)

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        os.kill(self._child, signal.SIGTERM)
        _, status = os.waitpid(self._child, 0)
        with os.fdopen(self._report, "rb") as report:
            told = report.read()
        if error_type is None:
            assert status == 0, "the reader found something wrong"
            self.num_looks = int(told)


def _look_on(looks, report):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    last = num_looks = 0
    for found in looks:
        assert found >= last, f"{found} after {last}"
        last = found
        num_looks += 1
        if stop:
            break
    os.write(report, str(num_looks).encode())
