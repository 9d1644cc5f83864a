"""How much memory can still be taken: of the machine, and of the control groups this process is in."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """The least of what the machine has and what every control group above this process still allows; at least 0."""
    rooms = [_machine_room()]
    for folder in group_folders():
        room = _group_room(folder, "memory.max", "memory.current")
        room = _group_room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes") if room is None else room
        rooms += [] if room is None else [room]
    return max(0, min(rooms))


def _machine_room() -> int:
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def group_folders(controller: str = "memory") -> list[Path]:
    """Those of this process and their ancestors, of control groups of both kinds."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = _MOUNT / controllers
            own = root / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _group_room(folder: Path, limit_file: str, used_file: str) -> int | None:
    """None without a limit. Files in the page cache that nobody uses count as free: the kernel drops them at need."""
    try:
        limit, used = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", or no such group
        return None
    return limit - used + int(statistics.get("inactive_file", 0))
