"""What each thread of a save does when: `python -m benchmarks.timeline --out results.json`.

torch.profiler records the steps of the extension and, on CUDA, the copies of the device's own engine. Saves with and
without a profiler take turns, which shows what recording costs. The profiled save of median length is kept, step by
step; `python -m benchmarks.report` draws it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from . import measure, program, results
from .cases import KINDS, MIB, build, format_size

PREFIX = "statedict_io::"
SAVE = "save"
COPY_ENGINE = "copy engine"
WRITE = "write"


class Step(NamedTuple):
    """Seconds from the beginning of the save; ``lane`` is a thread, or a device."""

    name: str
    lane: str
    start_s: float
    end_s: float


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = program.document(options, durable=options.durable)
    with program.scratch(options.dir) as directory:
        document["timeline"] = measure_timeline(options, directory / "checkpoint.pt")
    print_timeline(document["timeline"])
    program.write(document, options)
    return 0


def measure_timeline(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    import statedict_io as sio

    if sio.backend_info().name != "native":
        raise SystemExit(f"steps are recorded by the extension, which is not in use: {sio.backend_info()}")
    case = build(options.case, options.size, options.device)

    def save() -> None:
        sio.save(case.state, path, durable=options.durable)

    plain, profiled = [], []
    for _ in range(options.rounds + 1):
        plain.append(prepared(options.device, path, save))
        profiled.append(profiled_save(options, path, save))
    # Not the first, which sets the profiler up.
    median_s, steps, profile = sorted(profiled[1:], key=lambda of_round: of_round[0])[(options.rounds - 1) // 2]
    if options.trace is not None:
        profile.export_chrome_trace(str(options.trace))
    return {
        "case": options.case,
        "payload_bytes": case.payload_nbytes,
        "not_profiled": results.measured([{"s": seconds} for seconds in plain]),
        "profiled": results.measured([{"s": seconds} for seconds, _, _ in profiled]),
        "save_s": median_s,
        "summary": summary(steps, median_s),
        "steps": [list(step) for step in steps],
    }


def prepared(device: str, path: Path, save: Any) -> float:
    """Seconds of one save of a new file, with nobody's dirty pages about."""
    path.unlink(missing_ok=True)
    os.sync()
    measure.synchronize_device(device)
    start = time.perf_counter()
    save()
    return time.perf_counter() - start


def profiled_save(options: argparse.Namespace, path: Path, save: Any) -> tuple[float, list[Step], Any]:
    from torch.profiler import ProfilerActivity, profile, record_function

    def recorded() -> None:
        with record_function(SAVE):
            save()

    activities = [ProfilerActivity.CPU]
    if options.device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiling:
        prepared(options.device, path, recorded)
    seconds, steps = steps_of(profiling.events())
    return seconds, steps, profiling


def steps_of(events: Any) -> tuple[float, list[Step]]:
    """The length of the save among a profile's events, and its steps."""
    import torch

    def on_cpu(event: Any) -> bool:
        return bool(event.device_type == torch.autograd.DeviceType.CPU)

    whole = next(event for event in events if event.name == SAVE and on_cpu(event)).time_range
    threads = sorted({event.thread for event in events if event.name.startswith(PREFIX) and on_cpu(event)})
    steps = []
    for event in events:
        if on_cpu(event) and event.name.startswith(PREFIX):
            name, lane = event.name[len(PREFIX) :], f"thread {threads.index(event.thread)}"
        elif not on_cpu(event) and "Memcpy" in event.name:
            name, lane = COPY_ENGINE, f"device {event.device_index}"
        else:
            continue
        start, end = (round(1e-6 * (time - whole.start), 6) for time in (event.time_range.start, event.time_range.end))
        steps.append(Step(name, lane, start, end))
    return round(1e-6 * (whole.end - whole.start), 6), sorted(steps, key=lambda step: step.start_s)


def summary(steps: list[Step], save_s: float) -> dict[str, Any]:
    """By step: how often, in how many lanes, how long, and how much of it while some write was in progress."""
    writes = union([step for step in steps if step.name == WRITE])
    of_steps = {}
    for name in sorted({step.name for step in steps}):
        of_name = [step for step in steps if step.name == name]
        spans = union(of_name)
        of_steps[name] = {
            "count": len(of_name),
            "lanes": len({step.lane for step in of_name}),
            "total_s": sum(step.end_s - step.start_s for step in of_name),
            "in_progress_s": length(spans),
            "in_progress_beside_writes_s": length(intersection(spans, writes)),
        }
    return {"steps": of_steps, "nothing_in_progress_s": save_s - length(union(steps)), "writes": at_once(steps, save_s)}


def at_once(steps: list[Step], save_s: float) -> list[float]:
    """Seconds with 0, 1, 2 ... writes in progress."""
    changes = sorted(
        [(s.start_s, 1) for s in steps if s.name == WRITE] + [(s.end_s, -1) for s in steps if s.name == WRITE]
    )
    seconds = [0.0]
    count, since = 0, 0.0
    for moment, change in [*changes, (save_s, 0)]:
        seconds[count] += moment - since
        count, since = count + change, moment
        seconds += [0.0] * (count + 1 - len(seconds))
    return seconds


def union(steps: list[Step]) -> list[tuple[float, float]]:
    """The spans of time in which at least one of them was in progress."""
    spans: list[tuple[float, float]] = []
    for step in sorted(steps, key=lambda step: step.start_s):
        if spans and step.start_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], step.end_s))
        else:
            spans.append((step.start_s, step.end_s))
    return spans


def intersection(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[tuple[float, float]]:
    both = [(max(a[0], b[0]), min(a[1], b[1])) for a in some for b in others]
    return [span for span in both if span[0] < span[1]]


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def title(timeline: dict[str, Any]) -> str:
    rate = timeline["payload_bytes"] / timeline["save_s"] / 1e9
    not_profiled, first = timeline["not_profiled"]["median"]["s"], timeline["not_profiled"]["first"]["s"]
    return (
        f"{timeline['case']}, {format_size(timeline['payload_bytes'])}: {timeline['save_s'] * 1e3:.0f} ms, "
        f"{rate:.2f} GB/s (not profiled: {not_profiled * 1e3:.0f} ms, the first {first * 1e3:.0f})"
    )


def cells(timeline: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    headings = ["step", "count", "lanes", "summed", "in progress", "of the save", "beside writes"]
    body = []
    for name, step in timeline["summary"]["steps"].items():
        in_progress = step["in_progress_s"]
        beside = "-" if name == WRITE else f"{step['in_progress_beside_writes_s'] / in_progress:.0%}"
        body.append(
            [
                name,
                str(step["count"]),
                str(step["lanes"]),
                f"{step['total_s'] * 1e3:.1f} ms",
                f"{in_progress * 1e3:.1f} ms",
                f"{in_progress / timeline['save_s']:.0%}",
                beside,
            ]
        )
    return headings, body


def writes_line(timeline: dict[str, Any]) -> str:
    shares = [
        f"{count}: {seconds / timeline['save_s']:.0%}" for count, seconds in enumerate(timeline["summary"]["writes"])
    ]
    return f"Writes in progress, share of the save: {', '.join(shares)}"


def print_timeline(timeline: dict[str, Any]) -> None:
    print(f"{title(timeline)}\n{results.plain_table(*cells(timeline))}\n{writes_line(timeline)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("timeline", __doc__, rounds=5)
    parser.add_device()
    parser.add_argument("--case", choices=sorted(KINDS), default="llama")
    parser.add_argument("--no-durable", dest="durable", action="store_false", help="save with durable=False")
    parser.add_argument(
        "--trace", type=Path, help="write the profile for Perfetto or chrome://tracing (.json or .json.gz)"
    )
    return parser.options(arguments, size=16 * MIB)


if __name__ == "__main__":
    sys.exit(main())
