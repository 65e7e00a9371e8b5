"""Pictures of a results file: seconds by contender, time by size, a timeline of one save.

One quantity an axis. Each shows where its figures come from and how far they spread: the median, a thick line from the
lower to the upper quartile, and a thin one from the least to the greatest.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import results, timeline
from .cases import format_size

OURS, PEER, REFERENCE = "#1b6ca8", "#9aa5b1", "#d9b44a"
COLOURS = {"ours": OURS, "peer": PEER, "raw": REFERENCE}
#: Raw writes that are no files on the disk.
NOT_ON_THE_DISK = ("raw_tmpfs", "raw_pinned")
#: Of contenders by size: their colour and their line.
STYLES: dict[str, dict[str, Any]] = {
    "native": {"color": OURS, "lw": 2.5},
    "native_nodurable": {"color": "#63b3e4", "lw": 2.5},
    "torch_atomic": {"color": "#7a4b94"},
    "torch_nocrc": {"color": "#c26a2e"},
    "raw_direct": {"color": REFERENCE, "ls": "--"},
}
STEPS = {
    "preallocate": ("reserve the file's blocks", PEER),
    "copy_and_crc32": ("copy and checksum", "#2e8b57"),
    "crc32": ("checksum", "#2e8b57"),
    "device_to_host": ("wait for copies from the device", REFERENCE),
    "copy engine": ("copies from the device", "#b03a2e"),
    "write": ("write to the disk", "#a9cbe6"),
}
MIN_ROUNDS = 3


class Bar(NamedTuple):
    label: str
    colour: str
    median: float
    spread: list[float]  # least, lower quartile, upper quartile, greatest


def bar(label: str, colour: str, entry: dict[str, Any], field: str) -> Bar:
    return Bar(label, colour, entry["median"][field], entry["spread"][field])


def draw(document: dict[str, Any], directory: Path, stem: str) -> list[Path]:
    about = results.provenance(document)
    if "timeline" in document:
        lanes(document["timeline"], about, directory / f"{stem}.png")
        return [directory / f"{stem}.png"]
    if results.is_compared(document):
        return [sampled(of, about, directory / f"{stem}-{of.name}.png") for of in results.compared(document)]
    runs = [run for run in document["runs"] if run["op"] == "save" and run["contenders"]]
    written = []
    for name in dict.fromkeys(map(part_name, runs)):
        of_part = [run for run in runs if part_name(run) == name and results.rounds(run) >= MIN_ROUNDS]
        if len(of_part) > 2 and all("torch" in run["contenders"] for run in of_part):
            path = directory / f"{stem}-{name}-by-size.png"
            by_size(sorted(of_part, key=lambda run: int(run["payload_bytes"])), about, path)
            written.append(path)
            continue
        for run in of_part:
            path = directory / f"{stem}-{name}-{format_size(run['payload_bytes']).replace(' ', '')}.png"
            saves(run, about, path)
            written.append(path)
    return written


def part_name(run: dict[str, Any]) -> str:
    """Of the runs of one case, and of one part of the benchmark if it has parts."""
    part = run.get("part", run["case"])
    return run["case"] if part == run["case"] else f"{part.replace(' ', '-')}-{run['case']}"


def saves(run: dict[str, Any], about: str, path: Path) -> None:
    """Until the call returns, and until the file is on the device."""
    shown = [row for row in results.rows(run) if row["key"] not in NOT_ON_THE_DISK]
    panels = {
        title: [bar(row["label"], COLOURS[row["kind"]], run["contenders"][row["key"]], metric) for row in shown]
        for metric, title in (
            ("return_s", "seconds until the call returns"),
            ("durable_s", "seconds until the file is on the device"),
        )
    }
    compare(panels, results.title(run), f"{results.rounds(run)} rounds; {about}", path)


def sampled(of: results.Compared, about: str, path: Path) -> Path:
    bars = [bar(label, colour_of(label), entry, of.field) for label, entry in of.contenders.items()]
    count = min(entry["rounds"] for entry in of.contenders.values())
    compare({of.quantity: bars}, of.title, f"{count} rounds; {about}", path)
    return path


def colour_of(label: str) -> str:
    if label.startswith("statedict_io"):
        return OURS
    return REFERENCE if label in ("raw", "parallel memcpy", "no checkpoints") else PEER


def compare(panels: dict[str, list[Bar]], title: str, caption: str, path: Path) -> None:
    """A panel for each quantity, all in the same unit, and in it a bar for each contender."""
    labels = [bar.label for bar in next(iter(panels.values()))]
    height = 0.42 * len(labels) + 1.9
    figure, drawn = plt.subplots(
        1, len(panels), figsize=(6 + 4 * len(panels), height), layout="constrained", sharey=True, squeeze=False
    )
    # One slow round in ten would squeeze all others; it is named at the edge.
    ceiling = 1.15 * max(bar.spread[2] for bars in panels.values() for bar in bars)
    for axes, (quantity, bars) in zip(drawn[0], panels.items(), strict=True):
        axes.barh(range(len(bars)), [bar.median for bar in bars], color=[bar.colour for bar in bars], height=0.7)
        for position, bar in enumerate(bars):
            least, low, high, greatest = bar.spread
            axes.plot([least, min(greatest, ceiling)], [position, position], color="black", lw=0.75, alpha=0.6)
            axes.plot([low, high], [position, position], color="black", lw=2.5, solid_capstyle="butt")
            if greatest > ceiling:
                axes.text(ceiling, position, f" to {greatest:.3g}", va="center", fontsize=7)
        axes.set_xlim(0, ceiling)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(quantity)
        axes.spines[["top", "right"]].set_visible(False)
    drawn[0][0].invert_yaxis()
    finish(
        figure, title, f"Bar: median. Thick line: middle half of the rounds. Thin line: all rounds.\n{caption}", path
    )


def by_size(runs: list[dict[str, Any]], about: str, path: Path) -> None:
    """Time over that of `torch.save` for the same size in the same run."""
    figure, drawn = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharex=True, sharey=True)
    sizes = [run["payload_bytes"] for run in runs]
    for axes, metric, until in zip(
        drawn, results.METRICS, ("until the call returns", "until the file is on the device"), strict=True
    ):
        of_torch = [run["contenders"]["torch"]["median"][metric] for run in runs]
        axes.axhline(1, color=PEER, lw=2, label="torch.save")
        for key, style in STYLES.items():
            entries = [run["contenders"][key] for run in runs]
            middle, low, high = (
                [value / reference for value, reference in zip(values, of_torch, strict=True)]
                for values in (
                    [entry["median"][metric] for entry in entries],
                    [entry["spread"][metric][1] for entry in entries],
                    [entry["spread"][metric][2] for entry in entries],
                )
            )
            axes.plot(sizes, middle, marker="o", ms=4, label=entries[0]["label"], **style)
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [format_size(size) for size in sizes])
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axes.set_xlabel("size of the one tensor that is saved")
        axes.set_title(until, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    drawn[0].set_ylabel("time, in times of torch.save (less is better)")
    drawn[1].legend(fontsize=8)
    count = f"{min(map(results.rounds, runs))} rounds a size"
    finish(figure, "save: one tensor", f"Line: median. Band: middle half of the rounds.\n{count}; {about}", path)


def lanes(of_save: dict[str, Any], about: str, path: Path) -> None:
    """A lane for each thread and each device's copy engine, a bar for each step."""
    steps = [timeline.Step(*step) for step in of_save["steps"]]
    names = sorted({step.lane for step in steps}, key=lambda lane: (not lane.startswith("device"), lane))
    figure, axes = plt.subplots(figsize=(12, 0.35 * len(names) + 2), layout="constrained")
    for step_name in of_save["summary"]["steps"]:
        bars = [step for step in steps if step.name == step_name]
        label, colour = STEPS[step_name]
        axes.barh(
            [names.index(step.lane) for step in bars],
            [1e3 * (step.end_s - step.start_s) for step in bars],
            left=[1e3 * step.start_s for step in bars],
            color=colour,
            label=label,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * of_save["save_s"])
    axes.set_xlabel("ms since the save began")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=6, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    finish(figure, timeline.title(of_save), f"One save, recorded by torch.profiler.\n{about}", path)


def finish(figure: Any, title: str, caption: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(
        "\n".join(wrapped(caption.splitlines(), int(17 * figure.get_figwidth()))), fontsize=7, color="#444444"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width)]
