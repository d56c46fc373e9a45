"""`help` of a configuration explains its fields, and reads no source before it is asked."""

import subprocess
import sys
from dataclasses import dataclass, fields

import pytest

from leanmim.cli import COMMANDS
from leanmim.config import Pretrain
from leanmim.config.base import Config
from leanmim.config.explained import explain
from tests.config.docstrings import docstrings


@pytest.mark.parametrize("kind", [row.config for row in COMMANDS.values()])
def test_the_docstring_explains_each_field(kind: type) -> None:
    text = " ".join((kind.__doc__ or "").split())
    places = [text.index(f" {name}: {' '.join(said.split())}") for name, said in docstrings(kind).items()]
    assert places
    order = docstrings(kind)
    assert [own.name for own in fields(kind)] == sorted(order, key=lambda name: text.index(f" {name}: "))


def test_a_field_declared_again_is_explained_as_the_last_says() -> None:
    assert "input_size: Pixels: one number for a square, or height and width.\n" in str(Pretrain.__doc__)


def test_help_prints_them() -> None:
    code = "import leanmim; help(leanmim.Knn)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "k: Neighbours." in done.stdout, done.stderr


def test_no_source_is_read_at_import() -> None:
    code = """
import inspect
inspect.getsource = None
import leanmim
leanmim.Pretrain(data="photos", out="run")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_source_the_docstring_stays() -> None:
    names = {"dataclass": dataclass, "Config": Config}
    exec('@dataclass(frozen=True, kw_only=True)\nclass Own(Config):\n    """Own."""\n    size: int = 3', names)
    explain(names["Own"])
    assert names["Own"].__doc__ == "Own."
