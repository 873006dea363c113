"""Every command of docs/data.md runs as it stands there, on the files that it speaks of."""

import re

import pytest

from recbole_ssm.cli import main
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:recbole-ssm|python run_recbole_ssm\.py) (.+)$", PAGE, re.MULTILINE)
VISITS = "session_id:token\tproduct:token\twhen:float\n" + "".join(
    f"s{user}\tp{(user + event * event) % 13}\t{1_600_000_000 + 60 * event}\n"
    for user in range(12)
    for event in range(6)
)


@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.startswith("compare")])
def test_a_command_of_the_page(tmp_path, command):
    (tmp_path / "dataset" / "visits").mkdir(parents=True)
    (tmp_path / "dataset" / "visits" / "visits.inter").write_text(VISITS)
    more = ["--epochs=1", "--show_progress=False", "--state=ERROR"] if command.startswith("--") else []
    assert main([*command.split(), *more]) == 0


def test_there_are_such_commands():
    assert len(COMMANDS) >= 4
