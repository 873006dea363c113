"""Files appear whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from recbole_ssm.files import exchange, whole


def test_threads_that_write_one_path_do_not_meet(tmp_path):
    def written(text):
        with whole(tmp_path / "it") as temporary:
            temporary.write_text(text)

    with whole(tmp_path / "it") as temporary, ThreadPoolExecutor(1) as other:
        temporary.write_text("one")
        other.submit(written, "two").result()
        assert (tmp_path / "it").read_text() == "two"
    assert (tmp_path / "it").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_folder_takes_no_name_that_another_has(tmp_path):
    """Where there is no place for the former one."""
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        exchange(tmp_path / "new", tmp_path / "target", None)
    assert (tmp_path / "target" / "file").read_text() == "target"
    exchange(tmp_path / "new", tmp_path / "target", tmp_path / "former")
    assert [(tmp_path / name / "file").read_text() for name in ("target", "former")] == ["new", "target"]
