"""What pip installs."""

import configparser
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

from recbole_ssm import __version__
from tests.conftest import REPOSITORY


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_every_package_is_listed():
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == {
        *find_packages(str(REPOSITORY), include=["recbole_ssm*"]),
        "recbole_ssm.dataset",
        "recbole_ssm.properties",
    }


def test_version_has_one_place():
    assert setup_cfg()["metadata"]["version"] == "attr: recbole_ssm.__version__"
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    dated = re.search(rf"^## {re.escape(__version__)} - ([-\d]+)$", changes, re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert dated and (citation["version"], citation["date-released"]) == (__version__, dated[1])


def test_readme_names_the_line_that_installs_recbole():
    from recbole_ssm.errors import INSTALL_RECBOLE

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


def copy_of_the_sources(folder):
    """All that the repository keeps, without what git ignores: builds, caches, results and downloads."""
    ignored = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "*.so", "*.egg-info")
    at_the_top = {"build", "dataset", "dist", "log", "log_tensorboard", "saved", "site"}

    def ignore(source, names):
        return ignored(source, names) | (at_the_top & set(names) if source == str(REPOSITORY) else set())

    shutil.copytree(REPOSITORY, folder, ignore=ignore)
    for part in ("README.md", "toy/toy.inter"):
        (folder / "dataset" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "dataset" / part, folder / "dataset" / part)


def run_setup(folder, *arguments):
    """Run setup.py where there is no compiler, so that it takes a second."""
    environment = {**os.environ, "CC": "no-compiler", "CXX": "no-compiler"}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_without_a_compiler_it_installs_and_no_older_library_stays(tmp_path):
    copy_of_the_sources(tmp_path / "copy")
    library = tmp_path / "copy" / "recbole_ssm" / "_native.so"
    library.write_text("of older sources")
    assert "the native kernels were not built" in run_setup(tmp_path / "copy", "build_ext", "--inplace")
    assert not library.exists()


# What lies about in a clone and is nobody else's.
SCRATCH = (
    ".git/config", ".ci/install.log", ".pytest_cache/README.md", "recbole_ssm/_native.so", "saved/run/best.safetensors",
    "recbole_ssm/__pycache__/keys.cpython-311.pyc", "tests/__pycache__/conftest.cpython-311.pyc", "log/SASRec/x.log",
    "dataset/ml-1m/ml-1m.inter", "site/index.html", "build/lib/recbole_ssm/keys.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """What the source distribution of an untidy clone holds, unpacked, and the names that it should hold."""
    folder = tmp_path_factory.mktemp("source")
    copy_of_the_sources(folder / "copy")
    expected = files_below(folder / "copy") - {".gitignore"}
    for name in SCRATCH:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).write_text("scratch")
    run_setup(folder / "copy", "sdist")
    (archive,) = (folder / "copy" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked, expected


def test_the_source_distribution_holds_all_that_is_kept_and_no_more(source_distribution):
    unpacked, expected = source_distribution
    found = {name for name in files_below(unpacked) if ".egg-info/" not in name}
    # The workflows are the host's.
    expected = {name for name in expected if not name.startswith(".github/")}
    assert found == {*expected, "PKG-INFO"}


@pytest.fixture(scope="module")
def wheel(source_distribution, tmp_path_factory):
    """A wheel that was built from the source distribution, without kernels, unpacked."""
    unpacked, folder = source_distribution[0], tmp_path_factory.mktemp("wheel")
    run_setup(unpacked, "-q", "bdist_wheel", "-d", str(folder))
    (found,) = folder.iterdir()
    assert found.name == f"recbole_ssm-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(found) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_the_properties_and_the_toy(source_distribution, wheel):
    package = REPOSITORY / "recbole_ssm"
    expected = {f"recbole_ssm/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {
        f"recbole_ssm/{name}"
        for name in ("py.typed", "serving/page.html", "study/published.csv", "dataset/toy/toy.inter")
    }
    expected |= {f"recbole_ssm/properties/{name}" for name in files_below(REPOSITORY / "properties")}
    assert {name for name in files_below(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_finds_its_toy_in_an_empty_folder(wheel):
    """Outside the clone; the whole training from an installed wheel is in the slow tests."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-m", "recbole_ssm", "inspect", "toy"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "60" in found.stdout and "20" in found.stdout


def test_the_toy_comes_along_unless_data_path_has_one(tmp_path):
    from recbole_ssm.arguments import TOY
    from recbole_ssm.quick_start import configure

    assert configure("SASRec", "toy")["data_path"] == str(TOY) and (TOY / "toy.inter").is_file()
    (tmp_path / "dataset" / "toy").mkdir(parents=True)
    assert configure("SASRec", "toy")["data_path"] == "dataset/toy"


def test_what_the_extras_are_for_is_written_down():
    extras = setup_cfg()["options.extras_require"]
    page = (REPOSITORY / "docs" / "getting_started.md").read_text()
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in extras if f"`{name}`" not in table] == []


@pytest.mark.slow
def test_a_wheel_in_an_environment_of_its_own_trains_without_a_compiler(tmp_path):
    """Builds and installs as pip does, so it needs a package index. PyTorch is taken from here."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (tmp_path / "empty").mkdir()

    def run(*arguments):
        environment = {**os.environ, "PATH": str(tmp_path / "venv" / "bin"), "PYTHONPATH": ""}
        command = [str(python), *arguments]
        found = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return found.stdout

    # The environment from which the tests run is not the one that the new one looks into.
    (Path(run("-c", "import site; print(site.getsitepackages()[0])").strip()) / "tests.pth").write_text(
        "\n".join(site.getsitepackages())
    )
    run("-m", "pip", "install", "--no-deps", "--force-reinstall", str(wheel))
    assert "native kernels built; instruction set" in run("-m", "recbole_ssm", "doctor")
    run("-m", "recbole_ssm", "train", "--dataset=toy", "--epochs=1")
    assert list((tmp_path / "empty").glob("saved/2Mamba4Rec-toy-*/best.safetensors"))
