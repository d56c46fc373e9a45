"""What the evaluators refuse."""

import pytest

from leanmim.config import Knn, Probe
from leanmim.config.evaluate import Evaluate
from leanmim.errors import UserError
from leanmim.evaluators.evaluate import evaluate
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Knn, {"k": 0}, "--k 0 is out of range; it is at least 1"),
        (Knn, {"temperature": float("nan")}, "--temperature nan"),
        (Knn, {"crop": 0.0}, "--crop 0.0 is out of range; it is at least 0.01, at most 1"),
        (Probe, {"batch_size": 0}, "--batch-size 0"),
        (Probe, {"workers": -2}, "--workers -2"),
        (Probe, {"crop": 1.5}, "--crop 1.5 is out of range; it is at least 0.01, at most 1"),
        (Probe, {"input_size": (32, 32, 32)}, "--input-size takes one number or two"),
        (Probe, {"input_size": (-32,)}, "--input-size -32 is out of range"),
        (Probe, {"epochs": 0}, "--epochs 0"),
        (Probe, {"warmup_epochs": -1}, "--warmup-epochs -1"),
        (Probe, {"probe_batch_size": 1}, "--probe-batch-size 1"),
        (Probe, {"c": 0.0}, "--c 0.0"),
        (Probe, {"seed": -1}, "--seed -1"),
        (Probe, {"queries": 0}, "--queries 0"),
        (Evaluate, {"k": (5, 0)}, "--k 0 is out of range; it is at least 1"),
        (Evaluate, {"layers": (-1,)}, "--layers -1 is out of range; it is at least 0"),
        (Evaluate, {"shots": (0,)}, "--shots 0"),
        (Evaluate, {"draws": 0}, "--draws 0"),
        (Evaluate, {"c": 0.0}, "--c 0.0"),
        (Evaluate, {"crop": 1.5}, "--crop 1.5"),
        (Probe, {"log_every": 0}, "--log-every 0"),
        (Probe, {"checkpoint_minutes": -1.0}, "--checkpoint-minutes -1.0"),
    ],
)
def test_values_that_cannot_be(kind: type, wrong: dict[str, object], message: str) -> None:
    measure = {Knn: knn, Probe: probe, Evaluate: evaluate}[kind]
    with pytest.raises(UserError, match=message):
        list(measure(kind(run="r", data="d", **wrong)))


def test_the_default_probe_reads_each_image_once() -> None:
    assert Probe(run="r", data="d").solver == "fast"


def test_the_probe_has_no_options_of_knn() -> None:
    for name in ("k", "temperature"):
        with pytest.raises(TypeError, match=name):
            Probe(run="r", data="d", **{name: 1})  # type: ignore[arg-type]
