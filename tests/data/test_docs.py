"""Every command of docs/data.md runs as it stands there, on the files that it speaks of."""

import re
import shlex

import pytest

from recbole_ssm.cli import main
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    recbole-ssm (.+)$", PAGE, re.MULTILINE)
VISITS = "session_id:token\tproduct:token\twhen:float\n" + "".join(
    f"s{user}\tp{(user + event * event) % 13}\t{1_600_000_000 + 60 * event}\n"
    for user in range(12)
    for event in range(6)
)


ROWS = [(f"s{u}", f"p{(u + t * t) % 5}", 1_600_000_000 + t) for u in range(6) for t in range(4)]
FILES = {
    "visits.csv": "session_id,item_id,timestamp,price,shop\n" + "".join(f"{u},{i},{t},1.5,12\n" for u, i, t in ROWS),
    "clicks.dat": "".join(f"{u};2020-01-01T00:00:0{t % 10}Z;{i};0\n" for u, i, t in ROWS),
    "Beauty.txt": "1 5 7 9 5\n2 7 5\n",
    "pairs.txt": "1 5\n1 7\n2 7\n",
    "german.csv": "user_id,item_id,timestamp\nu,i,31.12.2019\n",
    "american.csv": "user_id,item_id,timestamp\nu,i,01/27/2023 05:55 PM\n",
    "products.csv": "sku,title,price\n" + "".join(f"p{i},The {i},{i}.5\n" for i in range(5)),
}


@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.startswith("compare")])
def test_a_command_of_the_page(tmp_path, command):
    (tmp_path / "dataset" / "visits").mkdir(parents=True)
    (tmp_path / "dataset" / "visits" / "visits.inter").write_text(VISITS)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    more = ["--epochs=1", "--show_progress=False", "--state=ERROR"] if command.startswith("train") else []
    assert main([*shlex.split(command), *more]) == 0


def test_there_are_such_commands():
    assert len(COMMANDS) >= 11
