"""Samples to medians and their spread, medians to ratios, ratios to a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from .cases import format_size
from .contenders import Contender
from .processes import BEFORE, WorkerProcess

METRICS = ("return_s", "durable_s")


def entry(kind: type[Contender], worker: WorkerProcess, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One contender's part."""
    return {
        "label": BEFORE * worker.name.startswith(BEFORE) + kind.label,
        "durable": kind.durable,
        "kind": kind.kind,
        "writes_file": kind.writes_file,
        "about": worker.about,
        "status": worker.status,
        "reason": worker.reason,
        **measured(samples),
    }


def measured(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of all samples of one contender. The first save of a process is kept apart as `first`: it pays for
    pools and page faults. `samples` are the others; they are written to the file of `--samples` only."""
    counted = samples[1:]
    return {
        "first": samples[0] if samples else None,
        "rounds": len(counted),
        "median": of_fields(counted, median),
        "spread": of_fields(counted, spread),
        "samples": counted,
    }


def of_fields(samples: list[dict[str, Any]], summed_up: Callable[[list[float]], Any]) -> dict[str, Any]:
    """Field by field, through nested samples; a field that was not measured in some round is left out."""
    found: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if all(isinstance(value, dict) for value in values):
            found[name] = of_fields(values, summed_up)
        elif all(isinstance(value, (int, float)) for value in values):
            found[name] = summed_up(values)
    return found


def median(values: list[float]) -> float:
    return _six_digits(statistics.median(values))


def spread(values: list[float]) -> list[float]:
    """Least, lower quartile, upper quartile, greatest."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return [_six_digits(value) for value in (min(values), low, high, max(values))]


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def seconds(run: dict[str, Any], key: str, metric: str) -> float | None:
    found = run["contenders"].get(key, {}).get("median", {}).get(metric)
    return found if found else None


def rounds(run: dict[str, Any]) -> int:
    """How often each contender was measured, at the least."""
    return min((of["rounds"] for of in run["contenders"].values() if of["status"] == "ok"), default=0)


def raw_limit(run: dict[str, Any], metric: str) -> float | None:
    """Seconds of the fastest program that writes as many bytes without a format, or of the bus where that is slower.

    What a saver is held against, and no law: one that is about as fast passes it in every second run."""
    writes = [seconds(run, key, metric) for key in ("raw_buffered", "raw_direct")]
    known = [s for s in writes if s is not None]
    bus = seconds(run, "raw_pinned", "return_s")
    return max(min(known), bus or 0.0) if known else None


class Compared(NamedTuple):
    """One quantity, measured of several contenders in turns."""

    name: str
    title: str
    quantity: str
    field: str
    contenders: dict[str, Any]


#: What the documents have in which one quantity after the other is compared.
COMPARED = ("stall", "parts", "directories", "remote")


#: of `benchmarks.reading`, and what they do
COMPARED_PARTS = {
    "cold": "load",
    "warm": "load",
    "many": "load",
    "safetensors": "load a file of safetensors",
    "diff": "compare two files",
}


def is_compared(document: dict[str, Any]) -> bool:
    return any(name in document for name in COMPARED)


def compared(document: dict[str, Any]) -> list[Compared]:
    """What a file of `benchmarks.asynchronous`, `.reading`, `.directories` or `.remote` compares."""
    if "remote" in document:
        return [
            Compared(
                "-".join([part["action"], str(part["connections"]), *remote_notes(part)]),
                remote_title(part),
                f"seconds, {part['action'].replace('_', ' ')}",
                "s",
                {entry["label"]: entry for entry in part["contenders"].values() if entry["median"]},
            )
            for part in document["remote"]
        ]
    if "directories" in document:
        return [
            Compared(f"{number}", part["what"], "seconds of the call", "s", part["contenders"])
            for number, part in enumerate(document["directories"])
        ]
    if "stall" in document:
        stall, training = document["stall"], document["training"]
        size, every = format_size(training["checkpoint_bytes"]), training["checkpoint_every"]
        return [
            Compared(
                "call",
                f"asynchronous save: {format_size(stall['payload_bytes'])}, tensors on {stall['device']}",
                "seconds the call takes",
                "call_s",
                stall["contenders"],
            ),
            Compared(
                "training",
                f"training with a checkpoint of {size} every {every} steps",
                "training steps per second (more is better)",
                "steps_per_second",
                training["contenders"],
            ),
        ]
    parts = [(name, document["parts"][name]) for name in COMPARED_PARTS if name in document["parts"]]
    return [
        Compared(
            name,
            f"{COMPARED_PARTS[name]}: {format_size(part['payload_bytes'])}, {part['tensors']:,} tensors, "
            + ("from the disk" if part["cold"] else "from the page cache"),
            "seconds until all is read" if name == "diff" else "seconds until loaded, every page touched",
            "s",
            {label: of for label, of in part["contenders"].items() if of["status"] == "ok"},
        )
        for name, part in parts
    ]


def rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per contender that ran. Ratios over 1 mean faster than the reference; `of_limit` is the share of the raw
    limit's speed. Each metric is compared with the same metric of the reference."""
    table = []
    for key, contender in run["contenders"].items():
        if contender["status"] == "skipped" or not contender["median"]:
            continue
        row: dict[str, Any] = {"key": key, **{name: contender[name] for name in ("label", "durable", "kind")}}
        for metric in METRICS:
            mine = seconds(run, key, metric)
            limit = raw_limit(run, metric)
            row[metric] = mine
            if mine is None:
                continue
            row[f"{metric}:gb_s"] = run["payload_bytes"] / mine / 1e9
            for column, reference in (("vs_torch", "torch"), ("vs_nocrc", "torch_nocrc")):
                theirs = seconds(run, reference, metric)
                row[f"{metric}:{column}"] = theirs / mine if theirs else None
            row[f"{metric}:of_limit"] = limit / mine if limit else None
        for name in ("peak_over_ready_bytes", "cpu_s_per_gb"):
            row[name] = contender["median"].get(name)
        row["largest_gap_s"] = contender["spread"].get("largest_gap_s", [None])[-1]
        row["first_s"] = contender["first"].get("return_s") if contender["first"] else None
        table.append(row)
    return table


SAVE_COLUMNS = (
    ("contender", "label", "{}"),
    ("returns s", "return_s", "{:.4f}"),
    ("GB/s", "return_s:gb_s", "{:.2f}"),
    ("x torch", "return_s:vs_torch", "{:.2f}"),
    ("x no CRC", "return_s:vs_nocrc", "{:.2f}"),
    ("% raw", "return_s:of_limit", "{:.0%}"),
    ("durable s", "durable_s", "{:.4f}"),
    ("GB/s", "durable_s:gb_s", "{:.2f}"),
    ("x torch", "durable_s:vs_torch", "{:.2f}"),
    ("x no CRC", "durable_s:vs_nocrc", "{:.2f}"),
    ("% raw", "durable_s:of_limit", "{:.0%}"),
    ("first s", "first_s", "{:.4f}"),
    ("+MiB", "peak_over_ready_mib", "{:.0f}"),
    ("CPU s/GB", "cpu_s_per_gb", "{:.2f}"),
    ("largest gap s", "largest_gap_s", "{:.4f}"),
)
LOAD_COLUMNS = (
    ("contender", "label", "{}"),
    ("warm returns s", "warm_return", "{:.4f}"),
    ("warm touched s", "warm_touched", "{:.4f}"),
    ("GB/s", "warm_gb_s", "{:.2f}"),
    ("x torch", "warm_vs_torch", "{:.2f}"),
    ("cold returns s", "cold_return", "{:.4f}"),
    ("cold touched s", "cold_touched", "{:.4f}"),
    ("GB/s", "cold_gb_s", "{:.2f}"),
    ("x torch", "cold_vs_torch", "{:.2f}"),
)


def load_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    table = []
    reference = run["contenders"].get("torch", {}).get("median", {})
    for key, contender in run["contenders"].items():
        if not contender["median"]:
            continue
        row: dict[str, Any] = {"key": key, "label": contender["label"]}
        for how in ("warm", "cold"):
            times = contender["median"][how]
            row[f"{how}_return"], row[f"{how}_touched"] = times["return_s"], times["touched_s"]
            row[f"{how}_gb_s"] = run["payload_bytes"] / times["touched_s"] / 1e9
            if reference:
                row[f"{how}_vs_torch"] = reference[how]["touched_s"] / times["touched_s"]
        table.append(row)
    return table


def cells(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text."""
    columns = SAVE_COLUMNS if run["op"] == "save" else LOAD_COLUMNS
    body = []
    for row in rows(run) if run["op"] == "save" else load_rows(run):
        if row.get("peak_over_ready_bytes") is not None:
            row["peak_over_ready_mib"] = row["peak_over_ready_bytes"] / 2**20
        body.append(["-" if row.get(name) is None else form.format(row[name]) for _, name, form in columns])
    return [heading for heading, _, _ in columns], body


def title(run: dict[str, Any]) -> str:
    size, count = run.get("payload_bytes", run["size_bytes"]), run.get("tensors", 0)
    part = f", part {run['part']!r}" if run.get("part", run["case"]) != run["case"] else ""
    tensors = f"{count:,} tensor{'' if count == 1 else 's'}"
    return f"{run['op']}: {run['case']}, {format_size(size)}, {tensors} ({run['about']}){part}"


def provenance(document: dict[str, Any]) -> str:
    """Where the figures come from: machine, disk, versions, commit, date, how often and how they were taken."""
    machine, disk, settings = document["machine"], document["filesystem"], document["settings"]
    versions, commit = document["versions"], (document["git"]["commit"] or "unknown")[:10]
    how = [f"{settings['mode']} files"] if "mode" in settings else []
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['ram_bytes'] or 0)} of memory",
        *([machine["accelerator"]] if machine.get("accelerator") else []),
        f"Linux {machine['kernel']}",
        *([f"{disk['type']} on {disk['device']}"] if "type" in disk else []),
        f"Python {versions['python']}, torch {versions.get('torch', '?')}",
        f"commit {commit}{' with changes' if document['git']['dirty'] else ''}",
        document["date"][:10],
        *how,
        f"tensors on {settings.get('device', 'cpu')}",
    ]
    return "; ".join(parts)


def print_table(run: dict[str, Any]) -> None:
    headings, body = cells(run)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title(run))
        print(plain_table(headings, body))
    else:
        table = Table(title=title(run))
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
        for row in body:
            table.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=240)).print(table)
    for key, contender in run["contenders"].items():
        if contender["status"] != "ok":
            print(f"  {contender['status']}: {key}: {contender['reason']}")


def plain_table(headings: list[str], body: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [headings, *body]) for i in range(len(headings))]
    lines = []
    for row in [headings, ["-" * width for width in widths], *body]:
        first, rest = (
            row[0].ljust(widths[0]),
            [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)],
        )
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)


def remote_notes(part: dict[str, Any]) -> list[str]:
    return [*([] if part["rate"] else ["unlimited"]), *([part["set"]] if part["set"] else [])]


def remote_title(part: dict[str, Any]) -> str:
    speed = f"{part['rate'] / 1e6:g} MB/s each" if part["rate"] else "no limit of the rate"
    size, connections = format_size(part["payload_bytes"]), part["connections"]
    action = part["action"].replace("_", " ")
    title = f"{action}: {size}, {connections} connections, {part['latency_s'] * 1e3:g} ms, {speed}"
    return f"{title} ({part['set']})" if part["set"] else title


def remote_cells(part: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what `benchmarks.remote` measured of one action at one number of connections."""
    nbytes, rate = part["payload_bytes"], part["rate"]
    is_whole = part["action"] != "first_tensor"
    headings = ["", "seconds", "MB/s", "of the network", "extra MiB", "CPU s/GB", "requests"]
    if not is_whole:
        headings[2:4] = ["MB read", "round trips (with connecting)"]
    body = []
    for entry in part["contenders"].values():
        if not entry["median"]:
            continue
        median = entry["median"]
        speed, extra = nbytes / median["s"], median.get("extra_bytes")
        share = f"{speed / (part['connections'] * rate):.0%}" if rate else "-"
        body.append(
            [
                entry["label"],
                f"{median['s']:.2f}",
                f"{speed / 1e6:.0f}" if is_whole else f"{median['nbytes_down'] / 1e6:.1f}",
                share if is_whole else f"{median['round_trips']:g} ({entry['first']['round_trips']})",
                "-" if extra is None else f"{extra / 2**20:.0f}",
                f"{median['cpu_s_per_gb']:.2f}",
                f"{median['requests']:g}",
            ]
        )
    return headings, body
