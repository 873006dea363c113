"""The benchmark of LlamaRec checks that all implementations give the same scores, and measures each."""

import json

import pytest

from recbole_ssm.bench import main
from recbole_ssm.errors import UserError


def test_every_implementation_is_measured(tmp_path):
    small = ["--users=2", "--rounds=1", "--width=16", "--layers=1", "--vocabulary=1000", "--candidates=4"]
    main(["llm", *small, f"--json={tmp_path / 'rows.json'}"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3 * 4
    assert all(row["candidates_per_second"] > 0 for row in rows)
    plain = {row["verbalizer"]: row["s_a_user"] for row in rows if row["implementation"] == "plain"}
    for row in rows:
        assert row["speedup_over_plain"] == pytest.approx(plain[row["verbalizer"]] / row["s_a_user"])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(
        UserError, match=r"--vocabulary: must be at least \d+, as many tokens as the titles need, got 4"
    ):
        main(["llm", "--users=1", "--width=16", "--layers=1", "--vocabulary=4"])
