"""The runner's end of a worker: start, order, answer, and an end even where the worker hangs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Before a key, or the name of a library: the same contender of another checkout.
BEFORE = "before "


def checkout(text: str) -> Path:
    """Of another commit, for `--before`."""
    directory = Path(text).resolve()
    if not (directory / "statedict_io" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of statedict_io")
    return directory


class WorkerProcess:
    """One contender. `status` goes from ok to skipped (can't do this here) or failed (should have worked) and never
    back; `reason` says why. The worker is `start(name, **options)` in benchmarks/{module}.py."""

    def __init__(
        self,
        module: str,
        name: str,
        *,
        before: Path | None = None,
        timeout_s: float = 600,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        self.name = name
        self.status, self.reason = "ok", ""
        self.about: dict[str, str] = {}
        self.timeout_s = timeout_s
        how = {"module": module, "name": name.removeprefix(BEFORE), "options": options}
        if name.startswith(BEFORE):
            how["path"] = str(before)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(how)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else self._errors,
            text=True,
        )

    def wait_started(self) -> None:
        answer = self.answer()
        if answer is not None:
            self.about = answer["about"]

    def order(self, op: str, **arguments: Any) -> dict[str, Any] | None:
        """None when the worker can't, or can't any more."""
        self.send(op, **arguments)
        return self.answer()

    def send(self, op: str, **arguments: Any) -> None:
        """An order whose `answer` is waited for later, so that several workers can be at work."""
        if self.status != "ok":
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; answer() says how

    def answer(self) -> dict[str, Any] | None:
        """To the order that was sent first of those that have none yet."""
        if self.status != "ok":
            return None
        assert self._process.stdout is not None
        timer = threading.Timer(self.timeout_s, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": self._end()}
        for status in ("skipped", "failed"):
            if status in answer:
                self.status, self.reason = status, answer[status]
                return None
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _end(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        last_words = " | ".join(self._errors.read().splitlines()[-3:])
        return f"the worker ended with {status} (limit {self.timeout_s:g} s): {last_words}"
