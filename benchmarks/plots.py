"""Plots of a results file: bars per run, throughput against size where a case was run at several sizes; a timeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import results, timeline
from .cases import format_size

COLOURS = {"ours": "#1b6ca8", "peer": "#9aa5b1", "raw": "#d9b44a"}
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"lw": 2.5},
    "peer": {"lw": 1, "alpha": 0.8},
    "raw": {"lw": 1.5, "ls": "--"},
}
LIMIT_COLOUR = "#b03a2e"
STEP_COLOURS = {
    "preallocate": "#9aa5b1",
    "copy_and_crc32": "#2e8b57",
    "crc32": "#2e8b57",
    "device_to_host": "#d9b44a",
    "copy engine": "#b03a2e",
    "write": "#a9cbe6",
}


def draw(document: dict[str, Any], directory: Path, stem: str) -> list[Path]:
    if "timeline" in document:
        path = directory / f"{stem}.png"
        lanes(document["timeline"], path)
        return [path]
    runs = [run for run in document["runs"] if run["op"] == "save" and run["contenders"]]
    written = []
    for run in runs:
        path = directory / f"{stem}-{run['case']}-{format_size(run['size_bytes']).replace(' ', '')}.png"
        bars(run, path)
        written.append(path)
    for case in sorted({run["case"] for run in runs}):
        of_case = sorted((run for run in runs if run["case"] == case), key=lambda run: int(run["payload_bytes"]))
        if len(of_case) > 1:
            path = directory / f"{stem}-{case}-by-size.png"
            by_size(of_case, path)
            written.append(path)
    return written


def bars(run: dict[str, Any], path: Path) -> None:
    """Durable throughput as bars, throughput until return as a tick on each, the raw limit as a line across."""
    rows = [row for row in results.rows(run) if row["key"] not in ("raw_tmpfs", "raw_pinned")]
    labels = [row["label"] for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    positions = range(len(rows))
    axes.barh(positions, [row.get("durable_s:gb_s") or 0 for row in rows], color=[COLOURS[r["kind"]] for r in rows])
    returned = [row.get("return_s:gb_s") or 0 for row in rows]
    axes.plot(returned, positions, "|", color="black", markersize=14, label="until save() returns")
    limit = results.raw_limit(run, "durable_s")
    if limit:
        axes.axvline(run["payload_bytes"] / limit / 1e9, color=LIMIT_COLOUR, ls="--", lw=1, label="raw limit, durable")
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s until the file is on the device")
    figure.suptitle(results.title(run), fontsize=10)
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.0), framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def by_size(runs: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharex=True, sharey=True)
    for axes, metric, title in zip(
        panels, results.METRICS, ("until save() returns", "until on the device"), strict=True
    ):
        for key in runs[0]["contenders"]:
            points = [(run["payload_bytes"], results.seconds(run, key, metric)) for run in runs]
            known = [(nbytes, nbytes / seconds / 1e9) for nbytes, seconds in points if seconds]
            if not known or key in ("raw_tmpfs", "raw_pinned"):
                continue
            contender = runs[0]["contenders"][key]
            axes.plot(
                *zip(*known, strict=True), marker="o", ms=3, label=contender["label"], **STYLES[contender["kind"]]
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(
            [run["payload_bytes"] for run in runs],
            [format_size(run["payload_bytes"]) for run in runs],
            rotation=30,
            fontsize=8,
        )
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("GB/s")
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def lanes(of_save: dict[str, Any], path: Path) -> None:
    """A lane for each thread and each device's copy engine, a bar for each step."""
    names = sorted({step["lane"] for step in of_save["steps"]}, key=lambda lane: (not lane.startswith("device"), lane))
    figure, axes = plt.subplots(figsize=(12, 0.35 * len(names) + 1.8), layout="constrained")
    for step_name in of_save["summary"]["steps"]:
        bars = [step for step in of_save["steps"] if step["name"] == step_name]
        axes.barh(
            [names.index(step["lane"]) for step in bars],
            [1e3 * (step["end_s"] - step["start_s"]) for step in bars],
            left=[1e3 * step["start_s"] for step in bars],
            color=STEP_COLOURS[step_name],
            label=step_name,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * of_save["save_s"])
    axes.set_xlabel("ms since the save began")
    figure.suptitle(timeline.title(of_save), fontsize=10)
    figure.legend(fontsize=8, loc="outside lower right", ncols=6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
