"""What tells machines, their boots and their processes apart: of Linux from /proc, of macOS and Windows from calls of
theirs, which nobody has run yet. What cannot be found out is empty, 0 or None; nothing here raises."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any


def machine_id() -> str:
    """Of the installed system."""
    if sys.platform == "darwin":
        return _mac_hardware_id()
    if sys.platform == "win32":
        return _windows_machine_id()
    return _read("/etc/machine-id")


def boot_id() -> str:
    """Of the life of a system from its start on; empty where processes of an earlier one cannot be told from those of
    this one, or those of another machine of the same name from our own."""
    if sys.platform == "darwin":
        return _mac_setting("kern.bootsessionuuid")
    if sys.platform == "win32":
        return _windows_machine_id()  # the start time of a process is that of the calendar
    return _read("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> int:
    """0 where there is one for all."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def seconds_since_boot() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return float("inf") if clock is None else time.clock_gettime(clock)


def start_time(pid: int) -> int | None:
    """Of a running process, in the system's units; None of one that is not there, or that has ended and whose parent
    has not noticed; 0 where it cannot be told."""
    if sys.platform == "darwin":
        return _mac_start_time(pid)
    if sys.platform == "win32":
        return _windows_start_time(pid)
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        ended = fields[0] in ("Z", "X") and int(fields[17]) <= 1  # threads
        return None if ended else int(fields[19])
    except (IndexError, ValueError):
        return 0


def runs(pid: int, started: int) -> bool | None:
    """Whether the process that had this id and start time is still there, as far as can be told; None where nothing can
    be told."""
    if sys.platform == "win32":  # where os.kill(pid, 0) ends the process
        now = start_time(pid)
        return None if now == 0 or started == 0 else now == started
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
    now = start_time(pid)
    return 0 in (now, started) or now == started


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


# --- macOS


def _mac_setting(name: str) -> str:
    """A string among the kernel's settings (man 3 sysctlbyname)."""
    try:
        value = ctypes.create_string_buffer(256)
        nbytes = ctypes.c_size_t(len(value))
        done = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(nbytes), None, ctypes.c_size_t(0))
        return value.value.decode() if done == 0 else ""
    except (AttributeError, OSError, TypeError, ValueError):
        return ""


def _mac_hardware_id() -> str:
    """man 3 gethostuuid"""
    try:
        value = (ctypes.c_ubyte * 16)()
        no_wait = (ctypes.c_int64 * 2)(1, 0)  # struct timespec: 1 s
        return bytes(value).hex() if ctypes.CDLL(None).gethostuuid(value, no_wait) == 0 else ""
    except (AttributeError, OSError, TypeError):
        return ""


_PROC_PIDTBSDINFO = 3
_BSDINFO_NBYTES = 136  # struct proc_bsdinfo of sys/proc_info.h; its last 16 bytes are the start: s, us


def _mac_start_time(pid: int) -> int:
    try:
        info = ctypes.create_string_buffer(_BSDINFO_NBYTES)
        taken = ctypes.CDLL(None).proc_pidinfo(
            pid, _PROC_PIDTBSDINFO, ctypes.c_uint64(0), info, ctypes.c_int(_BSDINFO_NBYTES)
        )
    except (AttributeError, OSError, TypeError, ctypes.ArgumentError):
        return 0
    if taken != _BSDINFO_NBYTES:
        return 0
    seconds, microseconds = (int.from_bytes(info.raw[at : at + 8], sys.byteorder) for at in (120, 128))
    return seconds * 1_000_000 + microseconds


# --- Windows


def _windows_machine_id() -> str:
    try:
        import winreg

        registry: Any = winreg
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            return str(registry.QueryValueEx(key, "MachineGuid")[0])
    except (ImportError, AttributeError, OSError):
        return ""


_PROCESS_QUERY_LIMITED_INFORMATION = 0x1000
_SYNCHRONIZE = 0x100000
_ERROR_INVALID_PARAMETER = 87  # there is no such process
_WAIT_OBJECT_0 = 0  # it has ended, and somebody still holds a handle


def _windows_start_time(pid: int) -> int | None:
    try:
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = kernel.OpenProcess(_PROCESS_QUERY_LIMITED_INFORMATION | _SYNCHRONIZE, False, ctypes.c_uint32(pid))
        if not handle:
            gone = ctypes.get_last_error() == _ERROR_INVALID_PARAMETER  # type: ignore[attr-defined]
            return None if gone else 0
        process = ctypes.c_void_p(handle)
        try:
            if kernel.WaitForSingleObject(process, ctypes.c_uint32(0)) == _WAIT_OBJECT_0:
                return None
            times = [ctypes.c_uint64(0) for _ in range(4)]  # the first is when it was made
            done = kernel.GetProcessTimes(process, *map(ctypes.byref, times))
            return times[0].value if done else 0
        finally:
            kernel.CloseHandle(process)
    except (AttributeError, OSError, TypeError, ctypes.ArgumentError):
        return 0
