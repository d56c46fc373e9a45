"""What is built from the project: an sdist that can be tested, a typed wheel, a description without dead links."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "site", "build", "dist")
BUILD = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('dist'); build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and a wheel, built from a copy of the project."""
    pytest.importorskip("setuptools", "77", reason="pyproject.toml asks for it")
    copy = tmp_path_factory.mktemp("packaging") / "project"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


def test_the_sdist_holds_what_its_tests_and_its_demo_need(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("src", "tests", "demo", "docs", "benchmarks", "examples"):
        there = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        there = {name for name in there if not re.search("__pycache__|[.]egg-info|docs/notebooks/runs/", name)}
        assert there and there <= names, there - names
    assert {"Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= names
    assert {"pyproject.toml", "setup.py", "tests/conftest.py", "demo/photos/SOURCES.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_is_typed_and_says_who_wrote_it(dist: Path) -> None:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {"leanmim/py.typed", "leanmim/page/style.css"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"leanmim"}
    head, _, description = metadata.partition("\n\n")
    assert "Classifier: Typing :: Typed" in head and "Author: The leanmim authors" in head
    assert "Description-Content-Type: text/markdown" in head
    assert description.startswith("# leanmim") and "## Methods" in description
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", description) if not link.startswith("http")]


README = """# Title

![a picture](docs/a.png)
Its caption,
in two lines.

See [benchmarks](benchmarks/README.md#speed) and [a paper](https://arxiv.org/abs/1).
"""


def test_relative_links_become_absolute_or_text() -> None:
    for_index = runpy.run_path(str(ROOT / "setup.py"))["for_index"]
    shown = for_index(README, "https://example.org/me/it")
    assert "![a picture](https://example.org/me/it/raw/HEAD/docs/a.png)\nIts caption," in shown
    assert (
        "[benchmarks](https://example.org/me/it/blob/HEAD/benchmarks/README.md#speed) and [a paper](https://arxiv"
        in shown
    )
    shown = for_index(README, None)
    assert shown.startswith("# Title\n\nSee benchmarks and [a paper](https://arxiv.org/abs/1).\n")
