"""A command takes a configuration, its fields by name, or both."""

import subprocess
import sys
from pathlib import Path

import pytest

import leanmim
from leanmim.by_name import by_name
from leanmim.config import Knn, Pretrain
from leanmim.errors import UserError
from leanmim.recipes import MAE


def itself(config: Pretrain) -> Pretrain:
    """The configuration."""
    return config


same = by_name(itself)


def test_fields_by_name_beside_a_configuration_or_in_its_place() -> None:
    assert same(MAE) is not None
    assert same(MAE, data="photos", epochs=3) == Pretrain(data="photos", out="", epochs=3)
    assert same(data=Path("photos"), out=Path("run"), input_size=96).input_size == (96,)


def test_the_help_of_the_function_says_so() -> None:
    code = "import leanmim; help(leanmim.knn)"  # in a process whose functions no type checker has wrapped
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "\nknn(config: leanmim.config.evaluate.Knn = None, /, **fields) -> " in done.stdout, done.stderr
    assert "Fields of the configuration, a leanmim.Knn, may be given by name" in done.stdout


def test_wrong_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no field 'epoch'; did you mean epochs\? help\(leanmim.Pretrain\) has all"):
        same(data="photos", out="run", epoch=3)
    with pytest.raises(UserError, match="no field 'input_sise'; did you mean input_size"):
        same(MAE, input_sise=96)
    with pytest.raises(UserError, match="needs data and out"):
        same(epochs=3)
    with pytest.raises(UserError, match=r"give a leanmim\.Pretrain, or its fields by name; Knn is neither"):
        same(Knn(run="run", data="labelled"))  # type: ignore[arg-type]


def test_the_public_commands_take_them() -> None:
    with pytest.raises(UserError, match=r"leanmim\.Knn has no field 'neighbours'"):
        leanmim.knn(run="run", data="labelled", neighbours=3)
    assert "mae" in leanmim.cost(recipes="mae", model="vit_tiny_patch16_224", input_size=32)


def test_a_wrong_value_leaves_no_run_folder(tiny: Pretrain) -> None:
    for wrong in ({"epochs": "ten"}, {"batch_size": 2.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            leanmim.pretrain(tiny, **wrong)
    assert not Path(tiny.out).exists()
