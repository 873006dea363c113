"""Free memory goes back to the system where a process has grown, and a process that trains on the CPU uses it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_ssm import cli, memory


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


@pytest.mark.parametrize(
    ("library", "devices", "needed"),
    [
        ("glibc 2.36", (), True),
        ("glibc 2.38", (), False),
        ("glibc 2.36", ("/dev/nvidiactl",), False),
        ("musl 1.2.5", (), False),
        (None, (), False),
    ],
)
def test_where_the_allocator_needs_settings(monkeypatch, library, devices, needed):
    monkeypatch.setattr(os, "confstr", lambda name: library)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in devices)
    monkeypatch.delenv(memory.TUNABLES, raising=False)
    assert bool(memory.allocator_settings()) == needed
    monkeypatch.setenv(memory.TUNABLES, "")
    assert memory.allocator_settings() == {}


def test_a_process_begins_once_more_with_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from recbole_ssm import memory\n"
        "print(sys.argv[1:], os.environ.get('MADE_FOR_IT'), flush=True)\n"
        "memory.allocator_settings = lambda: {} if 'MADE_FOR_IT' in os.environ else {'MADE_FOR_IT': 'yes'}\n"
        "memory.restart_with_allocator_settings()\n"
    )
    command = [sys.executable, str(script), "train", "--text=two words"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['train', '--text=two words'] None", "['train', '--text=two words'] yes"]


def test_who_keeps_its_process(monkeypatch):
    begun = []
    Path("run.py").touch()
    monkeypatch.setattr(memory, "allocator_settings", lambda: {memory.TUNABLES: "x"})
    monkeypatch.setattr(os, "execve", lambda *arguments: begun.append(arguments))
    for program, command, again in (
        ("run.py", ["python", "-u", "run.py", "--a=1"], True),
        ("/lib/recbole_ssm/__main__.py", ["python", "-m", "recbole_ssm", "train"], True),
        ("run.py", ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], False),
        ("-", ["python", "-", "train"], False),
        ("/dev/null", ["python", "/dev/null", "train"], False),
        ("recbole-ssm", ["python", "-m", "pytest", "recbole_ssm"], False),
    ):
        monkeypatch.setattr(sys, "argv", [program, "train"])
        monkeypatch.setattr(sys, "orig_argv", command)
        begun.clear()
        memory.restart_with_allocator_settings()
        assert [(one[1][1:], one[2][memory.TUNABLES]) for one in begun] == ([(command[1:], "x")] if again else [])
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "run.py"])
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    memory.restart_with_allocator_settings()
    assert not begun


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        (["train", "--nokey"], 1),
        (["--nokey=1"], 1),
        (["keys", "seed"], 0),
        (["--version"], 0),
        (["bench", "--help"], 0),
        ([], 0),
    ],
)
def test_commands_that_train_begin_once_more(monkeypatch, arguments, begun):
    calls = []
    monkeypatch.setattr(cli, "restart_with_allocator_settings", lambda: calls.append(True))
    monkeypatch.setattr(sys, "argv", ["recbole-ssm", *arguments])
    cli.main()
    assert len(calls) == begun
    cli.main(arguments)
    assert len(calls) == begun
