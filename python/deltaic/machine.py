"""What this process may use of the machine, and uses: physical cores, within CPU affinity and control-group limits, and
memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CPU_ROOT = Path("/sys/devices/system/cpu")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _own_groups(root: Path, membership: Path) -> list[Path]:
    """This process's version 2 control group and its ancestors; just the root where membership cannot be told (inside a
    container the root is the container's own group)."""
    for line in (_read(membership) or "").splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            group = root / path.strip("/")
            return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return [root]


def cgroup_cpus(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs that control groups allow (version 2 `cpu.max`, version 1 `cpu.cfs_quota_us`); None for no limit."""
    quotas = [(_read(group / "cpu.max") or "").partition(" ")[::2] for group in _own_groups(root, membership)]
    quotas.append((_read(root / "cpu" / "cpu.cfs_quota_us") or "", _read(root / "cpu" / "cpu.cfs_period_us") or ""))
    # "max" (version 2) and "-1" (version 1) mean that there is no quota
    limits = [int(q) / int(p) for q, p in quotas if q.isdigit() and p.isdigit() and int(q) > 0 and int(p) > 0]
    return min(limits, default=None)


def physical_cores(cpus: list[int] | None = None, root: Path = _CPU_ROOT) -> int:
    """Distinct physical cores among `cpus` (default: those this process may run on). Where the system does not tell
    which hardware threads share a core, every hardware thread counts."""
    cpus = _allowed_cpus() if cpus is None else cpus
    cores = set()
    for cpu in cpus:
        siblings = _read(root / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.add(siblings if siblings else f"cpu{cpu}")
    return max(1, len(cores))


def default_threads() -> int:
    """Threads for computing: physical cores this process may run on, at most the control groups' quota, at least 1. A
    quota is rounded down: threads that wait for each other lose more to throttling than a fraction of a core brings."""
    quota = cgroup_cpus()
    cores = physical_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def memory_bytes(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Memory this process may use: the machine's, or a control group's limit where that is lower. None if unknown."""
    limits = [_read(group / "memory.max") for group in _own_groups(root, membership)]
    limits.append(_read(root / "memory" / "memory.limit_in_bytes"))
    found = [int(limit) for limit in limits if limit is not None and limit.isdigit()]
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def resident_bytes(status: Path = _STATUS) -> dict[str, int] | None:
    """Memory of this process that is in RAM: "now", of that "private" (not pages of mapped files), and the "peak".
    None where the system does not tell."""
    found = {}
    for line in (_read(status) or "").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "VmHWM") and value.split()[0].isdigit():
            found[name] = int(value.split()[0]) * 1024
    if set(found) != {"VmRSS", "RssAnon", "VmHWM"}:
        return None
    return {"now": found["VmRSS"], "private": found["RssAnon"], "peak": found["VmHWM"]}


def preemptions() -> int:
    """How often other processes took a processor from this one so far; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def available_bytes(
    root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Memory that is free for this process now: the machine's, or what a control group's limit leaves of it where that
    is less. Files in the page cache count as free. None where the system does not tell (Linux does)."""
    found = []
    for line in (_read(meminfo) or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and rest.split()[:1] and rest.split()[0].isdigit():
            found.append(int(rest.split()[0]) * 1024)
    for group in _own_groups(root, membership):
        limit, used, facts = _read(group / "memory.max"), _read(group / "memory.current"), _read(group / "memory.stat")
        if limit is not None and used is not None and limit.isdigit() and used.isdigit():
            cached = [line.split()[1] for line in (facts or "").splitlines() if line.startswith("inactive_file ")]
            found.append(max(0, int(limit) - int(used) + int(cached[0] if cached else 0)))
    return min(found, default=None)
