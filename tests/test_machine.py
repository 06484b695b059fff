"""How many threads and how much memory: from made-up system files, and that this machine's make sense."""

import os

import pytest
from deltaic import machine


def files(root, **contents):
    for name, content in contents.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7"] * 2):
        files(tmp_path, **{f"cpu{cpu}__topology__thread_siblings_list": f"{siblings}\n"})
    assert machine.physical_cores(list(range(8)), tmp_path) == 4
    assert machine.physical_cores([0, 4], tmp_path) == 1
    assert machine.physical_cores([0, 1, 5], tmp_path) == 2
    assert machine.physical_cores([8, 9], tmp_path) == 2  # nothing is known about these


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, None),
        ({"cpu_DOT_max": "max 100000\n"}, None),
        ({"cpu_DOT_max": "150000 100000\n"}, 1.5),
        ({"cpu_DOT_max": "nonsense"}, None),
        ({"cpu_DOT_max": "400000 100000\n", "a__cpu_DOT_max": "200000 100000\n"}, 2.0),
        ({"a__b__cpu_DOT_max": "50000 100000\n", "a__cpu_DOT_max": "max 100000\n"}, 0.5),
        ({"other__cpu_DOT_max": "50000 100000\n"}, None),
        ({"cpu__cpu_DOT_cfs_quota_us": "300000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 3.0),
        ({"cpu__cpu_DOT_cfs_quota_us": "-1\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, None),
    ],
)
def test_cpu_quotas_of_control_groups(tmp_path, contents, expected):
    (tmp_path / "membership").write_text("1:cpu:/x\n0::/a/b\n")
    assert machine.cgroup_cpus(files(tmp_path / "root", **contents), tmp_path / "membership") == expected


def test_quota_rounds_down_but_not_to_nothing(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 4)
    for quota, expected in ((None, 4), (16.0, 4), (2.9, 2), (0.3, 1)):
        monkeypatch.setattr(machine, "cgroup_cpus", lambda quota=quota: quota)
        assert machine.default_threads() == expected


def test_memory_is_the_lowest_limit(tmp_path):
    (tmp_path / "membership").write_text("0::/a\n")
    root = files(tmp_path / "root", memory_DOT_max="max", a__memory_DOT_max="1048576")
    assert machine.memory_bytes(root, tmp_path / "membership") == 1048576


def test_this_machine():
    assert 1 <= machine.default_threads() <= os.cpu_count()
    assert machine.memory_bytes() > 1 << 28
