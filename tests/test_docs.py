"""What the documents show works as it stands there."""

import re

import pytest

from tests.conftest import REPOSITORY

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
SNIPPETS = [(page.name, code) for page in PAGES for code in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(SNIPPETS)])
def test_the_python_of_a_page_runs(page, code, monkeypatch, tmp_path):
    (tmp_path / "dataset").symlink_to(REPOSITORY / "dataset")
    exec(compile(code, page, "exec"), {"__name__": "docs"})
