"""The memory that a process may use, from files as the kernel writes them for processes in control groups."""

import sys

import pytest

from statedict_io.system import host_memory

MIB = 1 << 20
NONE = str(0x7FFFFFFFFFFFF000)  # version 1 without a limit
MEMINFO = "MemTotal: 1000000000 kB\nMemFree: 1 kB\nMemAvailable: 900000 kB\nHugePages_Total: 0\n"
V1 = "30 20 0:26 {mounted} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_OTHER = "31 20 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:10 - cgroup cgroup rw,cpu"
V2_BESIDE_V1 = "32 20 0:28 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V2 = "32 20 0:28 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def write(root, files):
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.endswith("\n") else text + "\n")
    return str(root)


def v1(group, limit, usage="0", of_files=0):
    place = f"sys/fs/cgroup/memory/{group}"
    return {
        f"{place}/memory.limit_in_bytes": str(limit),
        f"{place}/memory.usage_in_bytes": str(usage),
        f"{place}/memory.stat": f"cache 9\ntotal_active_file {of_files}\ntotal_inactive_file {of_files}\n",
    }


def v2(group, limit, usage="0", of_files=0, high="max"):
    place = f"sys/fs/cgroup/{group}"
    return {
        f"{place}/memory.max": str(limit),
        f"{place}/memory.high": str(high),
        f"{place}/memory.current": str(usage),
        f"{place}/memory.stat": f"anon 1\nfile 9\nactive_file {of_files}\ninactive_file {of_files}\n",
    }


def process(cgroup, *mounts):
    return {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "\n".join(["20 1 0:1 / / rw - ext4 /dev/sda rw", *mounts]),
    }


CASES = {
    "version 1, its own group": (
        process("5:memory:/a/b\n4:cpu:/c", V1_OTHER, V1.format(mounted="/")),
        v1("a/b", 300 * MIB) | v1("a", NONE) | v1("", NONE),
        300 * MIB,
    ),
    "version 1, a group above": (
        process("5:memory:/a/b", V1.format(mounted="/")),
        v1("a/b", NONE) | v1("a", 200 * MIB) | v1("", NONE),
        200 * MIB,
    ),
    "version 1, several controllers in one hierarchy": (
        process("5:cpu,memory:/a", V1.format(mounted="/").replace("rw,memory", "rw,cpu,memory")),
        v1("a", 100 * MIB),
        100 * MIB,
    ),
    "version 1 in a container that sees its part": (
        process("5:memory:/docker/1f/sub", V1.format(mounted="/docker/1f")),
        v1("sub", NONE) | v1("", 150 * MIB),
        150 * MIB,
    ),
    "version 1, a group outside of what is mounted": (
        process("5:memory:/elsewhere", V1.format(mounted="/docker/1f")),
        v1("", 150 * MIB),
        150 * MIB,
    ),
    "version 2, its own group": (
        process("0::/user.slice/job", V2.format(mounted="/")),
        v2("user.slice/job", 300 * MIB) | v2("user.slice", "max"),
        300 * MIB,
    ),
    "version 2, a group above": (
        process("0::/user.slice/job/step", V2.format(mounted="/")),
        v2("user.slice/job/step", 300 * MIB) | v2("user.slice/job", 200 * MIB) | v2("user.slice", 250 * MIB),
        200 * MIB,
    ),
    "version 2, throttled from a lower number on": (
        process("0::/job", V2.format(mounted="/")),
        v2("job", 300 * MIB, high=100 * MIB),
        100 * MIB,
    ),
    "version 2 in a container of its own namespace": (
        process("0::/", V2.format(mounted="/")),
        v2("", 120 * MIB),
        120 * MIB,
    ),
    "version 2, a group above the namespace": (
        process("0::/../other", V2.format(mounted="/")),
        v2("", 120 * MIB),
        120 * MIB,
    ),
    "both": (
        process(
            "5:memory:/a\n0::/",
            V1.format(mounted="/"),
            V2.format(mounted="/").replace("/sys/fs/cgroup", "/sys/fs/unified"),
        ),
        v1("a", 90 * MIB),
        90 * MIB,
    ),
    "a name with a blank": (
        process("0::/my job", V2.format(mounted="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup\040two")),
        {"sys/fs/cgroup two/my job/memory.max": str(70 * MIB)},
        70 * MIB,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_smallest_limit_up_to_the_root_holds(case, tmp_path):
    of_process, of_groups, expected = CASES[case]
    assert host_memory.limit_nbytes(write(tmp_path, of_process | of_groups)) == expected


@pytest.mark.parametrize("files", [{}, process("4:cpu:/a"), process("0::/a", V2.format(mounted="/"))])
def test_without_limits_it_is_the_machine_s(files, tmp_path):
    assert host_memory.limit_nbytes(write(tmp_path, files)) == host_memory._physical_nbytes()
    assert host_memory.available_nbytes(str(tmp_path)) <= 900000 << 10


@pytest.mark.parametrize("version", [v1, v2])
def test_what_is_free_is_what_the_fullest_group_has_left(version, tmp_path):
    """Pages of files can be taken back: 400 MiB of limit, 300 taken, 2 x 50 of these are of files."""
    of_process = (
        process("5:memory:/a/b", V1.format(mounted="/"))
        if version is v1
        else process("0::/a/b", V2.format(mounted="/"))
    )
    groups = version("a/b", 1000 * MIB, 500 * MIB) | version("a", 400 * MIB, 300 * MIB, 50 * MIB)
    root = write(tmp_path, of_process | groups)
    assert host_memory.available_nbytes(root) == 200 * MIB
    settings = {"proc/sys/vm/dirty_background_bytes": "0", "proc/sys/vm/dirty_background_ratio": "10"}
    write(tmp_path, settings)
    assert host_memory.unthrottled_nbytes(root) == 20 * MIB
    write(tmp_path, {"proc/sys/vm/dirty_background_bytes": str(90000 << 10)})  # a tenth of what the machine has free
    assert host_memory.unthrottled_nbytes(root) == 20 * MIB
    write(tmp_path, version("a", 250 * MIB, 300 * MIB, 0))
    assert host_memory.available_nbytes(root) == 0


def test_of_this_machine():
    assert 0 < host_memory.available_nbytes() < sys.maxsize
    assert 0 < host_memory.limit_nbytes() <= host_memory._physical_nbytes()
    assert host_memory.unthrottled_nbytes() > 0
