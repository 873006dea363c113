"""What pip installs."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from setuptools import find_packages

from recbole_ssm import __version__
from tests.conftest import REPOSITORY


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_every_package_is_listed():
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == {*find_packages(str(REPOSITORY), include=["recbole_ssm*"]), "recbole_ssm.properties"}


def test_version_has_one_place():
    assert setup_cfg()["metadata"]["version"] == "attr: recbole_ssm.__version__"
    assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_readme_names_the_line_that_installs_recbole():
    from recbole_ssm.compat import INSTALL_RECBOLE

    assert INSTALL_RECBOLE in (REPOSITORY / "README.md").read_text()


def test_ops_layers_and_optim_need_no_recbole():
    code = "import sys, recbole_ssm.layers, recbole_ssm.optim; assert 'recbole' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readmes_layers_run():
    """Its example without RecBole, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "recbole_ssm.layers" in block]
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (8, 50, 64) and names["y_next"].shape == (8, 64)


def setup_in_a_copy(folder, *arguments, **environment):
    """Run setup.py on the sources alone."""
    shutil.copytree(
        REPOSITORY, folder, ignore=shutil.ignore_patterns(".*", "tests", "dataset", "saved", "log*", "build", "*.so")
    )
    (folder / "recbole_ssm" / "_native.so").write_text("of older sources")
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=folder, env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_without_a_compiler_it_installs_and_no_older_library_stays(tmp_path):
    nothing = {"CC": "no-compiler", "CXX": "no-compiler"}
    said = setup_in_a_copy(tmp_path / "copy", "build_ext", "--inplace", **nothing)
    assert "the native kernels were not built" in said
    assert not (tmp_path / "copy" / "recbole_ssm" / "_native.so").exists()


def test_the_source_distribution_holds_the_kernels(tmp_path):
    setup_in_a_copy(tmp_path / "copy", "sdist")
    (archive,) = (tmp_path / "copy" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {f"recbole_ssm/csrc/{path.name}" for path in (REPOSITORY / "recbole_ssm" / "csrc").iterdir()}
    assert sources and {*sources, "setup.py", "properties/overall.yaml"} <= names
    assert "recbole_ssm/_native.so" not in names


@pytest.mark.slow
def test_the_wheel_holds_the_properties(tmp_path):
    """Builds in an environment of its own, so it needs a package index."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "properties/model/2Mamba4Rec.yaml",
        "properties/dataset/ml-1m.yaml",
        "properties/overall.yaml",
        "py.typed",
    ):
        assert f"recbole_ssm/{name}" in names
