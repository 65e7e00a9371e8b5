"""Results to people: `python -m benchmarks.report RESULTS.json... [--page PAGE.md] [--plots DIR]`.

Without --page the markdown goes to stdout. In a page it replaces what stands between the two markers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import results, timeline

START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="put the tables between its markers")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots (needs matplotlib)")
    options = parser.parse_args(arguments)
    documents = [json.loads(path.read_text()) for path in options.results]
    text = "\n\n".join(markdown(document) for document in documents)
    if options.page is None:
        print(text)
    else:
        options.page.write_text(between_markers(options.page.read_text(), text))
    if options.plots is not None:
        from . import plots

        options.plots.mkdir(parents=True, exist_ok=True)
        for path, document in zip(options.results, documents, strict=True):
            for written in plots.draw(document, options.plots, path.stem):
                print(f"wrote {written}", file=sys.stderr)
    return 0


def between_markers(page: str, text: str) -> str:
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"the page has no {START} ... {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def markdown(document: dict[str, Any]) -> str:
    """One table per run, under one line that says where the figures come from."""
    if "timeline" in document:
        of_save = document["timeline"]
        parts = [source(document), markdown_table(timeline.title(of_save), *timeline.cells(of_save))]
        return "\n\n".join([*parts, timeline.writes_line(of_save)])
    if "remote" in document:
        tables = (
            markdown_table(results.remote_title(part), *results.remote_cells(part)) for part in document["remote"]
        )
        return "\n\n".join([source(document), *tables])
    if results.is_compared(document):
        return "\n\n".join([source(document), *map(compared_table, results.compared(document))])
    return "\n\n".join([source(document), *(table(run) for run in document["runs"] if run["contenders"])])


def source(document: dict[str, Any]) -> str:
    rounds = document["settings"].get("rounds")
    interleaved = f"; medians of up to {rounds} interleaved rounds" if rounds else ""
    return f"<sub>{results.provenance(document)}{interleaved}.</sub>"


def compared_table(of: results.Compared) -> str:
    body = []
    for label, entry in of.contenders.items():
        _, low, high, _ = entry["spread"][of.field]
        body.append([label, f"{entry['median'][of.field]:.3g}", f"{low:.3g} to {high:.3g}", str(entry["rounds"])])
    return markdown_table(of.title, ["", of.quantity, "middle half", "rounds"], body)


def table(run: dict[str, Any]) -> str:
    if run["op"] != "save":
        headings, body = results.cells(run)
        return markdown_table(results.title(run), headings, body)
    headings = ["", "returns", "x torch.save", "on the device", "x torch.save", "of raw program", "extra memory"]
    body = []
    for row in results.rows(run):
        extra = row.get("peak_over_ready_bytes")
        label = f"**{row['label']}**" if row["kind"] == "ours" else row["label"]
        label = f"*{label}*" if row["kind"] == "raw" else label
        body.append(
            [
                label,
                _seconds(row.get("return_s")),
                _number(row.get("return_s:vs_torch")),
                _seconds(row.get("durable_s")),
                _number(row.get("durable_s:vs_torch")),
                "-" if row.get("durable_s:of_limit") is None else f"{row['durable_s:of_limit']:.0%}",
                "-" if extra is None else f"{extra / 2**20:.0f} MiB",
            ]
        )
    rounds = results.rounds(run)
    return markdown_table(f"{results.title(run)}, {rounds} round{'' if rounds == 1 else 's'}", headings, body)


def markdown_table(title: str, headings: list[str], body: list[list[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
