"""Each model of a study is timed once, on its own backend."""

import torch

from recbole_ssm.ops import backend
from recbole_ssm.study import speed
from recbole_ssm.study.outcome import Run
from recbole_ssm.study.runs import Runs
from recbole_ssm.study.speed import speeds
from tests.study.conftest import DATA, SHORT


def test_models_that_cannot_be_timed_and_catalogues_below_ten_items(tmp_path, monkeypatch):
    class Small(torch.nn.Linear):
        def full_sort_predict(self, rows):
            if self.out_features == 5:
                raise IndexError("out of range")
            return self(rows)

    monkeypatch.setattr(speed, "_model", lambda options, run: (Small(3, int(run.model)), torch.ones(2, 3), "auto"))
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    found = speed._measure({}, [Run("4", "toy"), Run("5", "toy"), Run("20", "toy")])
    assert [one is not None for one in found] == [True, False, True]


def test_each_model_is_timed_on_its_own_backend(monkeypatch):
    used = set()

    class Small(torch.nn.Linear):
        def full_sort_predict(self, rows):
            used.add((self.out_features, backend._selected))
            return self(rows)

    def small(options, run):
        return Small(3, int(run.model)), torch.ones(2, 3), run.options["ssm_backend"]

    monkeypatch.setattr(speed, "_model", small)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    names = {"2": "torch", "3": "reference"}
    assert all(speed._measure({}, [Run(model, "toy", {"ssm_backend": name}) for model, name in names.items()]))
    assert used == {(2, "torch"), (3, "reference")} and backend._selected == "auto"


def test_a_latency_is_kept_with_its_data_and_a_failure_is_not(tmp_path, monkeypatch):
    measured = []

    def measure(machine_options, todo):
        measured.append(len(todo))
        return [None if one.dataset == "toyy" else {"p50_s": 1.0, "users_per_second": 2.0} for one in todo]

    monkeypatch.setattr(speed, "_measure", measure)
    runs = Runs(tmp_path / "r", DATA)
    for _ in range(2):
        assert speeds(runs, [SHORT, Run("Mamba4Rec", "toyy")]) == [{"p50_s": 1.0, "users_per_second": 2.0}, None]
    assert len(measured) == 3  # of the first one once
    (kept,) = (tmp_path / "r").glob("speed-*.json")
    kept.write_text("[")
    assert speeds(runs, [SHORT])[0]["p50_s"] == 1.0 and len(measured) == 4
    settings = {"ssm_backend": "auto"}
    monkeypatch.setattr(Runs, "content", lambda self, run: {"files": "others", "settings": settings})
    speeds(runs, [SHORT])
    assert len(measured) == 5
