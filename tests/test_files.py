"""Files appear whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

from recbole_ssm.files import whole


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
