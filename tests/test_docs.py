"""What the documents show works as it stands there."""

import re

import pytest

from tests.conftest import REPOSITORY

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = {page: BLOCK.findall(page.read_text(encoding="utf-8")) for page in FILES}


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    (tmp_path / "dataset").symlink_to(REPOSITORY / "dataset")
    names = {"__name__": "__main__"}
    # tests/serving/test_portable.py runs the one for onnxruntime, on an exported model.
    for block in (block for block in PAGES[page] if "import onnxruntime" not in block):
        exec(compile(block, page.name, "exec"), names)
