"""What this process may use of the machine: physical cores, within CPU affinity and control-group limits, and
memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CPU_ROOT = Path("/sys/devices/system/cpu")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def cgroup_cpus(root: Path = _CGROUP_ROOT) -> float | None:
    """CPUs that the control group's quota allows (version 2 `cpu.max`, version 1 `cpu.cfs_quota_us`), None for no
    limit."""
    unified = _read(root / "cpu.max")
    if unified is not None:
        quota, _, period = unified.partition(" ")
    else:
        quota = _read(root / "cpu" / "cpu.cfs_quota_us") or ""
        period = _read(root / "cpu" / "cpu.cfs_period_us") or ""
    # "max" (version 2) and "-1" (version 1) mean that there is no quota
    if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
        return int(quota) / int(period)
    return None


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
    """Threads for computing: physical cores this process may run on, at most the control group's quota, at least 1."""
    quota = cgroup_cpus()
    cores = physical_cores()
    return cores if quota is None else max(1, min(cores, round(quota)))


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or the control group's limit where that is lower. None if unknown."""
    total = None
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (_CGROUP_ROOT / "memory.max", _CGROUP_ROOT / "memory" / "memory.limit_in_bytes"):
        limit = _read(path)
        if limit is not None and limit.isdigit():
            total = int(limit) if total is None else min(total, int(limit))
    return total
