"""One contender in a process of its own; `benchmarks.processes` starts it, and is the other end.

Orders and answers are JSON objects, one a line, on stdin and stdout; what libraries print goes to stderr. An order
names an `op`, the method `do_{op}` of what the module's `start` has returned; its other fields are the arguments. The
answer is what it returns, or says why it was `skipped` or has `failed`. The first answer is to the start.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from .contenders.base import Unsupported


def main() -> int:
    how = json.loads(sys.argv[1])
    if "path" in how:  # of another checkout; benchmarks/ stays this one's
        sys.path.insert(0, how["path"])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Any = None

    def start() -> dict[str, Any]:
        nonlocal worker
        worker = importlib.import_module(f"benchmarks.{how['module']}").start(how["name"], **how["options"])
        return {"about": worker.about}

    answers.write(json.dumps(answer_of(start)) + "\n")
    for line in sys.stdin if worker is not None else ():
        order = json.loads(line)
        action = getattr(worker, f"do_{order.pop('op')}")
        answers.write(json.dumps(answer_of(lambda action=action, order=order: action(**order))) + "\n")
    if worker is not None:
        worker.close()
    return 0


def answer_of(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except Unsupported as unsupported:
        return {"skipped": str(unsupported)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
