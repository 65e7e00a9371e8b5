"""The runner's end of a worker: start, order, reply, and an end even where the worker hangs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .contenders import ALL

ROOT = Path(__file__).resolve().parents[1]


class WorkerFailed(Exception):
    pass


#: Before a key, or the name of a library: the same contender of another checkout.
BEFORE = "before "


def checkout(text: str) -> Path:
    """Of another commit, for `--before`."""
    directory = Path(text).resolve()
    if not (directory / "statedict_io" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of statedict_io")
    return directory


def start_worker(
    module: str, name: str, *options: str, before: Path | None, stderr: int | None
) -> subprocess.Popen[str]:
    """A process that takes orders on stdin. Python takes `statedict_io` and `benchmarks` from where it starts."""
    directory = before if name.startswith(BEFORE) else ROOT
    command = [sys.executable, "-m", f"benchmarks.{module}", name.removeprefix(BEFORE), *options]
    return subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )


class WorkerProcess:
    """`status` goes from ok to skipped (can't do this here) or failed (should have worked) and never back."""

    def __init__(
        self, key: str, device: str, op: str, timeout_s: float, verbose: bool = False, before: Path | None = None
    ) -> None:
        self.key = key
        self.kind = ALL[key.removeprefix(BEFORE)]
        self.label = BEFORE * key.startswith(BEFORE) + self.kind.label
        self.status, self.reason = "ok", ""
        self.timeout_s = timeout_s
        self.about: dict[str, str] = {}
        stderr = None if verbose else subprocess.PIPE
        self._process = start_worker("worker", key, "--device", device, "--op", op, before=before, stderr=stderr)
        self._errors: list[str] = []
        if not verbose:
            threading.Thread(target=self._collect_errors, daemon=True).start()

    def wait_started(self) -> None:
        answer = self._guarded(self._read)
        if answer is not None:
            self.about = answer["about"]

    def order(self, op: str, **arguments: Any) -> dict[str, Any] | None:
        """None when the worker can't, or can't any more; `status` and `reason` say why."""
        return self._guarded(lambda: self._send({"op": op, **arguments}))

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.close()
                self._process.wait(timeout=30)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()

    def _guarded(self, ask: Any) -> dict[str, Any] | None:
        if self.status != "ok":
            return None
        timer = threading.Timer(self.timeout_s, self._process.kill)
        timer.start()
        try:
            answer: dict[str, Any] = ask()
        except (OSError, WorkerFailed) as error:
            self.status, self.reason = "failed", str(error)
            return None
        finally:
            timer.cancel()
        if "unsupported" in answer:
            self.status, self.reason = "skipped", answer["unsupported"]
            return None
        if "error" in answer:
            self.status, self.reason = "failed", answer["error"]
            return None
        return answer

    def _send(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerFailed(f"the worker ended with {status} (limit {self.timeout_s:g} s): {self._last_words()}")
        return dict(json.loads(line))

    def _collect_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.rstrip())
            del self._errors[:-40]

    def _last_words(self) -> str:
        return " | ".join(self._errors[-3:])
