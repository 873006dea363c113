"""Files appear whole or not at all."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from recbole_ssm import files
from recbole_ssm.files import exchange, folder_beside, lock, recover, whole


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


def test_a_folder_stays_while_it_is_prepared_and_before_it_is_locked(tmp_path, monkeypatch):
    def late(file, wait=True):
        monkeypatch.undo()
        recover(tmp_path / "it")
        lock(file, wait)

    monkeypatch.setattr(files, "lock", late)
    with folder_beside(tmp_path / "it") as folder:
        assert folder.is_dir()
        recover(tmp_path / "it")
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())


def test_without_locks_a_folder_is_prepared_and_none_is_removed(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / ".it-abcd_123"
    left.mkdir()
    (left / "lock").touch()
    for name, value in (("recbole_ssm.files.fcntl.flock", flock), ("recbole_ssm.files.fcntl", None)):
        monkeypatch.setattr(name, value)
        with folder_beside(tmp_path / "it") as folder:
            recover(tmp_path / "it")
            assert folder.is_dir()
        recover(tmp_path / "it")
        assert list(tmp_path.iterdir()) == [left]
