"""Processes that share a machine: whether one of them has ended, though it did not say so."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

_STATE, _START = 0, 19  # of what /proc tells of a process after its name


def node_name() -> str:
    """This machine's name, and when it was started, since names are not always unique."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot}"


def process_name() -> str:
    """This process, for `has_ended`; empty where the system does not tell of processes as Linux does."""
    found = _told(os.getpid())
    space = _number_space()
    return f"{os.getpid()} {found[_START]} {space} {node_name()}" if found and space else ""


def has_ended(name: str) -> bool:
    """Whether the process of a name has ended, by what this machine knows; False for processes of other machines."""
    numbers, _, rest = name.partition(" pid:")
    if not name or f"pid:{rest}" != f"{_number_space()} {node_name()}":
        return False
    number, start = numbers.split()
    found = _told(int(number))
    if found:  # one that nobody has waited for has ended, too; its number may be another's by now
        return found[_STATE] in "ZX" or found[_START] != start
    try:
        os.kill(int(number), 0)  # tells of those, too, that /proc hides from this user
    except OSError as problem:
        return isinstance(problem, ProcessLookupError)
    return False


def _told(number: int) -> list[str]:
    """What /proc tells of a process, from its state on; nothing where there is none, or it tells nothing."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _number_space() -> str:
    """What numbers of processes hold for: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
