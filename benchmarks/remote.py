"""Saving to and loading from an object store over a slow network: `python -m benchmarks.remote --out results.json`.

A store in memory that speaks S3, behind a proxy with a latency and a rate per connection (tests/remote), both in a
process of their own. Contenders take turns, each in its own process, at each number of connections; `--rate 0` takes
the limit away and shows what a client's CPU can do. Requests are signed, their bodies are not, as is usual over https;
there is no TLS. Round 0, which warms up, has no limits where whole states are carried.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

from . import cases, courier, program, results
from .cases import MIB, parse_size
from .network import BUCKET
from .processes import BEFORE, WorkerProcess
from .turns import in_turn

#: The first is measured of a process that has no connection yet, too.
ACTIONS = ("first_tensor", "save", "load")
SAVED, LOADED = "saved.pt", "loaded.pt"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    document = json.loads(options.add_to.read_text()) if options.add_to else program.document(options, mode="remote")
    parts = document.setdefault("remote", [])
    failed = []
    with program.scratch(options.dir) as directory:
        path = directory / LOADED
        crc = finished_file(path, options.size)
        store = WorkerProcess("network", "store")
        store.wait_started()
        store.order("put", path=str(path), key=LOADED)
        settings = {"url": store.about["url"], "bucket": BUCKET, "path": str(path)}
        workers = {
            name: WorkerProcess("courier", name, before=options.before, **settings) for name in options.contenders
        }
        try:
            for worker in workers.values():
                worker.wait_started()
            for connections in options.connections:
                for worker in workers.values():
                    worker.order("begin", connections=connections, part_nbytes=options.part)
                for action in (action for action in ACTIONS if action in options.actions):
                    part = measured(action, connections, store, workers, options)
                    part["payload_bytes"] = path.stat().st_size
                    parts.append(part)
                    print_part(part)
            failed = [] if options.unchecked else checked(store, workers, options, path.stat().st_size, crc)
        finally:
            for worker in (*workers.values(), store):
                worker.close()
    program.write(document, options)
    failed += [f"{name}: {worker.reason}" for name, worker in workers.items() if worker.status == "failed"]
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed or store.status != "ok" else 0


def measured(
    action: str, connections: int, store: WorkerProcess, workers: dict[str, WorkerProcess], options: argparse.Namespace
) -> dict[str, Any]:
    able = [name for name in workers if action in courier.COURIERS[name.removeprefix(BEFORE)].actions]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
    for number in range(options.rounds + 1):
        warming = number == 0 and action != "first_tensor"
        store.order("limit", latency=0.0 if warming else options.latency, rate=None if warming else options.rate)
        for name in in_turn(able, number):
            if number > 1 and samples[name] and samples[name][-1]["s"] > options.once_s:
                continue
            store.order("reset")
            carried = workers[name].order("carry", action=action, key=SAVED if action == "save" else LOADED)
            traffic = store.order("traffic")
            if carried is not None and traffic is not None:
                carried["cpu_s_per_gb"] = carried["cpu_s"] / ((traffic["nbytes_up"] + traffic["nbytes_down"]) / 1e9)
                samples[name].append({**carried, **traffic})
    return {
        "action": action,
        "set": options.set,
        "connections": connections,
        "latency_s": options.latency,
        "rate": options.rate,
        "part_bytes": options.part,
        "contenders": {name: described(name, workers[name], samples[name]) for name in able},
    }


def described(name: str, worker: WorkerProcess, samples: list[dict[str, Any]]) -> dict[str, Any]:
    kind = courier.COURIERS[name.removeprefix(BEFORE)]
    return {
        "label": BEFORE * name.startswith(BEFORE) + kind.label,
        "needs": kind.needs,
        "about": worker.about,
        "status": worker.status,
        "reason": worker.reason,
        **results.measured(samples),
    }


def checked(
    store: WorkerProcess, workers: dict[str, WorkerProcess], options: argparse.Namespace, nbytes: int, crc: int
) -> list[str]:
    """What each has saved and loaded is right, and no upload is left. Without limits, not timed."""
    store.order("limit", latency=0.0, rate=None)
    wrong = []
    for name, worker in workers.items():
        kind = courier.COURIERS[name.removeprefix(BEFORE)]
        for action in (action for action in options.actions if action in kind.actions):
            if action != "save":
                found = worker.order("check", action=action, key=LOADED)
                if found is not None and not found["same"]:
                    wrong.append(f"{name}: {action} brought something else")
                continue
            worker.order("carry", action="save", key=f"{SAVED}.{name}")
            described = store.order("describe", key=f"{SAVED}.{name}")
            if worker.status != "ok" or described is None:
                continue
            # torch.save into a file object writes another folder's name into the archive.
            same = described["nbytes"] >= nbytes * 0.99 if kind.needs == "state" else described["crc32"] == crc
            if not same or described["uploads"]:
                wrong.append(f"{name}: saved {described}, wanted {nbytes} bytes with CRC-32 {crc}")
            store.order("remove", key=f"{SAVED}.{name}")
    return wrong


def finished_file(path: Path, nbytes: int) -> int:
    """A checkpoint of tensors of up to 64 MiB; its CRC-32."""
    import torch

    each = min(64 * MIB, max(nbytes // 16, 64))
    state = {
        f"layer{number}.weight": cases.random_tensor((each // 2,), torch.bfloat16, "cpu")
        for number in range(max(nbytes // each, 1))
    }
    torch.save(state, path)
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(16 * MIB):
            crc = zlib.crc32(data, crc)
    return crc


def print_part(part: dict[str, Any]) -> None:
    print(f"\n{results.remote_title(part)}\n{results.plain_table(*results.remote_cells(part))}", flush=True)
    for name, entry in part["contenders"].items():
        if entry["status"] != "ok":
            print(f"  {entry['status']}: {name}: {entry['reason']}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = program.Program("remote", __doc__, rounds=3)
    parser.add_before()
    parser.add_argument("--connections", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--latency", type=float, default=0.03, help="of a round trip, in seconds")
    parser.add_argument("--rate", type=float, default=40e6, help="bytes a second of a connection; 0: no limit")
    parser.add_argument("--part", type=parse_size, default=16 * MIB, help="of an upload, and of a range")
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--contenders", nargs="+", choices=[*courier.COURIERS], default=list(courier.COURIERS))
    parser.add_argument("--once-s", type=float, default=15, help="what takes longer is measured in one round only")
    parser.add_argument("--unchecked", action="store_true", help="do not compare in the end what was saved and loaded")
    parser.add_argument("--set", default="", help="a name for these contenders, where others are measured apart")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="put what is measured into these results")
    options = parser.options(arguments, size=8 * MIB, part=5 * MIB, connections=[2], latency=0.005)
    options.rate = options.rate or None
    if options.before is not None:
        options.contenders = [*options.contenders, BEFORE + "statedict_io"]
    return options


if __name__ == "__main__":
    sys.exit(main())
