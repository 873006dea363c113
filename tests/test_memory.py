"""Free memory goes back to the system where a process has grown, and not at every step."""

import sys

import pytest

from recbole_ssm import memory


def test_memory_is_given_back_after_growth_alone(monkeypatch):
    returned = []
    monkeypatch.setattr(memory, "_resident_before", 0)
    monkeypatch.setattr(memory, "return_free_memory", lambda: returned.append(True))
    for megabytes, before, expected in ((100, 0, 0), (300, 0, 1), (500, 300, 0), (600, 300, 1), (2400, 2000, 0)):
        monkeypatch.setattr(memory, "_resident_before", before << 20)
        monkeypatch.setattr(memory, "_resident", lambda size=megabytes: size << 20)
        returned.clear()
        memory.return_memory_of_growth()
        assert len(returned) == expected, (megabytes, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_lies_in_memory_is_known():
    memory.return_free_memory()
    assert 50 << 20 < memory._resident() < 20 << 30 and memory._resident_before > 0
