"""The runner's end of a worker: start, order, reply, and an end even where the worker hangs."""

from __future__ import annotations

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


def checkout_of(name: str, before: Path | None) -> Path:
    """The directory in which a worker starts, from which Python takes both `statedict_io` and `benchmarks`."""
    if not name.startswith(BEFORE):
        return ROOT
    assert before is not None
    return before


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
        command = [sys.executable, "-m", "benchmarks.worker", self.kind.key, "--device", device, "--op", op]
        self._stderr = None if verbose else subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            cwd=checkout_of(key, before),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
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
