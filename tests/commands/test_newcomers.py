"""What a newcomer to recommend met: users who are not known, events under another name, and what is written."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from recbole_ssm import arguments, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError

EVENTS = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
    f"u{u}\ti{(u + j) % 12}\t{j}\n" for u in range(12) for j in range(5)
)
HEADER = "Order Date|Product|Customer"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an untrained run on a data set of twelve users, without titles."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "data" / "shop").mkdir(parents=True)
    (folder / "data" / "shop" / "shop.inter").write_text(EVENTS)
    options = {
        "data_path": str(folder / "data"),
        "checkpoint_dir": str(folder / "saved"),
        "epochs": 1,
        "hidden_size": 32,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_recbole_ssm("2Mamba4Rec", "shop", config_dict={**options, "state": "WARNING"})
    return Path(result["checkpoint"]).parent


def test_users_who_are_not_in_the_data_set_are_named_as_such(run, capsys, caplog):
    Path("some.txt").write_text("u1\nu2\ndropped\n")
    assert main(["recommend", str(run.parent), "--users=some.txt", "--k=2"]) == 0
    assert (
        "1 users are not in data set shop and are answered by popularity; give their events: --users=EV" in caplog.text
    )
    assert "no event of a known item" not in caplog.text
    assert "the items have no titles: there is no file" in caplog.text and "--meta=FILE" in caplog.text
    wrote = f"wrote recommendations.csv: 6 rows without titles, for 3 users (run {run}, data set shop)\n"
    assert capsys.readouterr().out.endswith(wrote)


@pytest.mark.parametrize("known", [0, 1])
def test_a_file_of_events_is_not_taken_for_a_list_of_users(run, capsys, known):
    rows = [HEADER, *(f"2023-01-27|i{k % 9}|c{k}" for k in range(150)), *["u1"] * known]
    Path("orders.txt").write_text("\n".join(rows) + "\n")
    assert main(["recommend", str(run), "--users=orders.txt"]) == 2
    message = (
        f"--users: of {len(rows)} lines of orders.txt, 151 are no user of data set shop, such as '{HEADER}'; write one"
    )
    assert message in capsys.readouterr().err
    assert not Path("recommendations.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("when|what|who\n1|i1|u1\n", "orders.csv: name its columns by --user, --item"),
        (f"{HEADER}\n01/27/2023 05:55 PM|i1|u1\n", "give --time_format, here perhaps '%m/%d/%Y %I:%M %p', or drop"),
    ],
)
def test_a_table_that_must_be_converted_first_says_so(run, capsys, text, message):
    Path("orders.csv").write_text(text)
    assert main(["recommend", str(run), "--users=orders.csv"]) == 2
    error = capsys.readouterr().err
    assert message in error and "convert the file, then give dataset/NAME/NAME.inter)" in error


def test_columns_that_were_guessed_are_told(run, caplog):
    Path("orders.csv").write_text(f"{HEADER}\n2023-01-27|i1|u1\n")
    assert main(["recommend", str(run), "--users=orders.csv"]) == 0
    assert "orders.csv: user is Customer, item is Product, time is Order Date" in caplog.text


def test_the_beginning_of_an_option_is_near_to_it(run, capsys):
    assert main(["recommend", str(run), "--title=Name"]) == 2
    assert "recommend: there is no option --title; did you mean '--title_field'?" in capsys.readouterr().err


def test_a_data_set_of_nearly_that_name_is_named(run, capsys):
    where = f"--data_path={run.parent.parent / 'data'}"
    assert main(["inspect", "shp", where]) == 2
    assert "shp.inter; did you mean 'shop'?; set --data_path to" in capsys.readouterr().err
    assert main(["train", "--dataset=shp", where]) == 2
    assert "RecBole knows no download of that name; did you mean 'shop'?; set data_path" in capsys.readouterr().err


def test_without_recbole_every_command_says_how_to_install_it():
    code = "import sys; sys.modules['recbole'] = None; from recbole_ssm.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "recommend", "saved"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("recbole_ssm: error: RecBole is not installed; run: pip install --no-deps recbole==")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "module"),
    [("deep.py", "deep"), ("mine/deep.py", "mine.deep"), ("my-deep.py", "__main__"), (None, "__main__")],
)
def test_a_class_of_a_script_is_found_by_its_file(monkeypatch, script, module):
    running = types.ModuleType("__main__")
    if script:
        running.__file__ = script
    monkeypatch.setitem(sys.modules, "__main__", running)
    assert arguments.module_of(type("Deep", (), {"__module__": "__main__"})) == module
    assert arguments.module_of(UserError) == "recbole_ssm.errors"
