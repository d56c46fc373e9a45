"""From Python a field takes what can stand for its type, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from leanmim.config import Cost, Knn, Pretrain, Report
from leanmim.config.values import described, fitted
from leanmim.errors import UserError
from leanmim.recipes import MAE


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        (96, tuple[int, ...], (96,)),
        ([96, 128], tuple[int, ...], (96, 128)),
        ((), tuple[int, ...], ()),
        (0.5, tuple[float, ...] | None, (0.5,)),
        (None, tuple[float, ...] | None, None),
        (0.75, float | tuple[float, ...], 0.75),
        ([0.72, 0.78], float | tuple[float, ...], (0.72, 0.78)),
        ([0, 1], tuple[float, float], (0.0, 1.0)),
        (Path("photos"), str, "photos"),
        (Path("photos"), Annotated[str, "positional"], "photos"),
        (Path("run"), tuple[str, ...], ("run",)),
        ("auto", int | Literal["auto"], "auto"),
        (True, bool, True),
        ({"depth": 4}, dict[str, int], {"depth": 4}),
    ],
)
def test_what_can_stand_for_a_type(value: Any, kind: Any, found: Any) -> None:
    assert fitted(value, kind) == found
    assert type(fitted(value, kind)) is type(found)


@pytest.mark.parametrize(
    ("value", "kind", "wants"),
    [
        ("ten", int | Literal["auto"], "a whole number or 'auto'"),
        (2.5, int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (1, bool, "True or False"),
        (3, str, "a string"),
        ("96", tuple[int, ...], "(a whole number, ...)"),
        (0.9, tuple[float, float], "(a number, a number)"),
        ((3, 6.5), int | tuple[int, ...], "a whole number or (a whole number, ...)"),
        (None, float, "a number"),
        (1.0, Literal[1, 3], "1 or 3"),
        (3, dict[str, int], "a dict"),
    ],
)
def test_what_cannot(value: Any, kind: Any, wants: str) -> None:
    with pytest.raises(TypeError):
        fitted(value, kind)
    assert described(kind) == wants


def test_configurations_take_scalars_lists_and_paths() -> None:
    config = replace(
        MAE,
        data=Path("photos"),
        out=Path("run"),
        init=Path("a.pth"),
        input_size=96,
        phase_scales=1.0,
        phase_starts=[0.0],
    )
    assert (config.data, config.out, config.init, config.input_size) == ("photos", "run", "a.pth", (96,))
    assert (config.phase_scales, config.phase_starts) == ((1.0,), (0.0,))
    assert Pretrain(data="photos", out="run", input_size=[96, 128]).size == (96, 128)
    assert (config.mask_ratio, config.segments) == (0.75, 1)
    assert Report(runs=Path("run")).runs == ("run",)
    assert Knn(run=Path("run"), data=Path("labelled"), input_size=64).input_size == (64,)
    assert Cost(recipes="mae").recipes == ("mae",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": "ten"}, "epochs cannot be 'ten'; it takes a number or 'auto'"),
        ({"batch_size": 2.5}, "batch_size cannot be 2.5; it takes a whole number or 'auto'"),
        ({"schedule": "cosin"}, "schedule cannot be 'cosin'; it takes 'cosine' or 'step'"),
    ],
)
def test_an_error_names_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(MAE, **wrong)
    with pytest.raises(UserError, match=message):
        Pretrain(data="photos", out="run", **wrong)
