"""What a result must carry to mean anything later: machine, file system, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "statedict_io",
    "safetensors",
    "tensorizer",
    "torch_checkpointing",
    "deepspeed",
    "numpy",
    "fsspec",
    "s3fs",
    "boto3",
    "obstore",
    "s3torchconnector",
)


def describe(directory: Path, device: str) -> dict[str, Any]:
    return {
        "schema": 2,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "filesystem": filesystem(directory),
        "versions": versions(),
        "git": git(),
    }


def machine(device: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": memory_nbytes("MemTotal"),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "load_1min_at_start": round(os.getloadavg()[0], 2),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    if device != "cpu":
        described["accelerator"] = _output(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
        )
    return described


def filesystem(directory: Path) -> dict[str, Any]:
    """Of the mount that holds `directory`, from /proc/self/mountinfo."""
    best: dict[str, Any] = {}
    longest = -1
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        fields = right.split()
        inside = directory == Path(mount) or Path(mount) in directory.parents
        if inside and len(mount) >= longest and len(fields) >= 3:
            longest = len(mount)
            options = f"{left.split()[5]},{fields[2]}"
            best = {
                "mount": mount,
                "type": fields[0],
                "device": fields[1],
                "options": options,
                "device_number": left.split()[2],
            }
    number = best.get("device_number")
    if number:
        for name in ("rotational", "scheduler", "write_cache"):
            value = _read(f"/sys/dev/block/{number}/queue/{name}") or _read(f"/sys/dev/block/{number}/../queue/{name}")
            if value is not None:
                best[name] = value
    return best


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "executable": sys.executable}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": bool(changed) if changed is not None else None}


def memory_nbytes(field: str) -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
