"""The public names: the same functions from Python as on the command line, and their types for a type checker."""

import subprocess
import sys
from pathlib import Path

import pytest

import leanmim

COMMANDS = ("compare", "cost", "export", "knn", "plan", "pretrain", "probe", "report", "show")


def test_every_public_name_resolves_and_is_in_the_table_of_modules() -> None:
    for name in leanmim.__all__:
        assert getattr(leanmim, name) is not None, name
        assert name in dir(leanmim)
    listed = {name for names in leanmim._NAMES.values() for name in names.split()}
    assert listed == set(leanmim.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = leanmim.nonsense


def test_commands_are_functions_whatever_was_imported_before() -> None:
    """Submodules become attributes of the package when they are imported: none may hide a function."""
    code = f"""
import importlib, pkgutil, types
import leanmim

def check():
    for name in {COMMANDS}:
        assert isinstance(getattr(leanmim, name), types.FunctionType), (name, getattr(leanmim, name))

check()
import leanmim.costs, leanmim.train.pretrain, leanmim.evaluators.knn
check()
for module in pkgutil.walk_packages(leanmim.__path__, "leanmim."):
    if module.name != "leanmim.__main__":
        importlib.import_module(module.name)
check()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RIGHT = """
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import leanmim
from leanmim import MAE, Knn, Pretrain, UserError

config: Pretrain = replace(MAE, data="photos", out="run")
run: Path = leanmim.pretrain(config)
run = leanmim.pretrain(MAE, data=Path("photos"), out=Path("run"), input_size=96)
run = leanmim.pretrain(data="photos", out="run")
found: Iterator[tuple[str, float]] = leanmim.knn(Knn(run=str(run), data="labelled"))
for value in (leanmim.probe(leanmim.Probe(run="run", data="labelled")), found):
    accuracies: dict[str, float] = dict(value)
pages: list[Path] = [
    leanmim.show(leanmim.Show(runs=("run",))),
    leanmim.show(runs=("run",), count=3),
    leanmim.export(leanmim.Export(run="run")),
    leanmim.report(leanmim.Report(runs=("run",))),
]
model: leanmim.MIM = leanmim.build(config)
recipes: dict[str, Pretrain] = leanmim.RECIPES
version: str = leanmim.__version__
try:
    leanmim.plan(leanmim.Plan(data="photos"))
except UserError as error:
    print(error)
"""
WRONG = """
from dataclasses import replace; import leanmim
leanmim.nonsense
leanmim.pretrain("photos")
leanmim.Knn(run="run", data="labelled", neighbours=3)
folder: int = leanmim.pretrain(leanmim.MAE)
leanmim.Pretrain(data="a", out="b", epochs="ten")
replace(leanmim.MAE, epochs="ten")
leanmim.nonsense(1)
"""
SETTINGS = """
[mypy]
ignore_missing_imports = true
disable_error_code = name-defined, syntax, valid-type
[mypy-torch.*,torchvision.*,timm.*,numpy.*,tyro.*,rich.*,PIL.*,matplotlib.*,tensorboard.*,sklearn.*,jaxtyping.*]
follow_imports = skip
"""


def test_a_type_checker_knows_the_public_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for name, text in (("right.py", RIGHT), ("wrong.py", WRONG), ("mypy.ini", SETTINGS)):
        (tmp_path / name).write_text(text.lstrip())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "right.py", "wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    *errors, _ = done.stdout.splitlines()
    assert [line.partition(" error:")[0] for line in errors] == [f"wrong.py:{n}:" for n in range(2, 9)], done.stdout
    assert '"nonsense"' in errors[0]
    assert 'expected "Pretrain"' in errors[1]
