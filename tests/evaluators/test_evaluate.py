"""All measures in one table: each is what its own command finds."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import tyro
from safetensors.torch import save_file

from leanmim.config import Knn, Pretrain, Probe
from leanmim.config.evaluate import TRIVIAL, Evaluate
from leanmim.errors import UserError
from leanmim.evaluators import attentive, cache
from leanmim.evaluators.evaluate import evaluate
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe
from leanmim.run import Run
from tests.helpers import PLAIN
from tests.runs import contents

Options = dict[str, object]


@pytest.fixture(autouse=True)
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search would take long."""
    monkeypatch.setattr(attentive, "RATES", (16.0,))


def small(options: Options, **more: object) -> Evaluate:
    return Evaluate(**{**options, "epochs": 3, "draws": 3, **more})  # type: ignore[arg-type]


def test_it_has_all_measures_with_their_intervals(options: Options) -> None:
    found = evaluate(small(options, baselines=True))
    names = ["pretrained", "random", "pixels"]
    measures = ["kNN, k = 1", "kNN, k = 5", "kNN, k = 10", "kNN, k = 20", "kNN, k = 50"]  # of 72 images
    probes = ["linear, layer 1", "linear, layer 2", "linear, layer 3", "linear", "attentive"]
    shots = ["few-shot, 1 a class", "few-shot, 5 a class", "few-shot, 10 a class"]
    for name in names:
        own = [result.measure for result in found.results if result.name == name]
        assert own == [*measures, *([*probes] if name != "pixels" else ["linear"]), *shots]
    text = str(found)
    assert max(map(len, text.splitlines()[1:])) <= 80
    lines = {re.split(r"\s{2,}", line)[0]: line for line in text.splitlines()}
    for name in (*measures, *probes, *shots):
        assert name in lines
    assert lines["kNN, k = 1"].count("(") == 3 and lines["attentive"].count("(") == 2
    assert text.count("± of 3 draws") == 3
    assert "72 training and 24 validation images" in text


def test_they_are_what_the_other_commands_find(options: Options) -> None:
    found = {result.measure: result.accuracy for result in evaluate(small(options, k=(3,))).results}
    assert [found["kNN, k = 3"]] == [value for _, value in knn(Knn(**options, k=3))]  # type: ignore[arg-type]
    assert [found["linear"]] == [value for _, value in probe(Probe(**options))]  # type: ignore[arg-type]
    own = Probe(**options, solver="attentive", epochs=3)  # type: ignore[arg-type]
    assert [found["attentive"]] == [value for _, value in probe(own)]
    lines = [json.loads(line) for line in Run(Path(str(options["run"]))).evaluations.read_text().splitlines()]
    for what in ("knn", "probe", "attentive"):  # written down alike, so that the report has them once
        one, two = (line for line in lines if line["what"] == what)
        assert one == two


def test_every_result_is_written_down(options: Options) -> None:
    found = evaluate(small(options, layers=(2,), k=(1,), shots=(2,)))
    lines = [json.loads(line) for line in Run(Path(str(options["run"]))).evaluations.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["knn", "linear layer 2", "probe", "attentive", "few-shot 2"]
    for line, result in zip(lines, found.results, strict=True):
        assert line["value"] == result.accuracy and line["interval"] == list(result.accuracy.interval)
        assert (line["name"], line["images"], line["data"]) == ("pretrained", 24, options["data"])
    how = {"depth": None, "input_size": [32, 32], "crop": None, "pool": "avg"}
    assert lines[1]["options"] == {**how, "c": 1.0}
    assert lines[4]["options"] == {**how, "draws": 3, "seed": 0}
    assert lines[4]["deviation"] >= 0


def test_one_pass_computes_all_and_the_second_time_none(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    stream = cache.stream

    def watched(*rest: object) -> None:
        nonlocal calls
        calls += 1
        stream(*rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "stream", watched)
    first = evaluate(small(options))
    assert calls == 2
    assert str(evaluate(small(options))) == str(first)
    assert calls == 2


def test_more_shots_than_a_class_has_are_left_out(options: Options) -> None:
    found = evaluate(small(options, shots=(24, 25), k=(1,), attentive=False, layers=0))
    assert [result.measure for result in found.results] == ["kNN, k = 1", "linear", "few-shot, 24 a class"]


def test_a_layer_that_there_is_not(options: Options) -> None:
    with pytest.raises(UserError, match=r"--layers 5: this encoder has 4 blocks or stages"):
        evaluate(small(options, layers=(2, 5)))


def test_a_file_of_timm_leaves_nothing_behind(options: Options, tmp_path: Path) -> None:
    """And scratch as a baseline of another architecture would need its name: so does the message say."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **PLAIN)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    before = contents(tmp_path)
    own = {**options, "run": str(tmp_path / "weights.safetensors"), "input_size": (32,)}
    of_file = small(
        own, model="vit_tiny_patch16_224", model_kwargs=PLAIN, k=(5,), attentive=False, baselines=("random",)
    )
    assert [name for _, _, name, _ in evaluate(of_file).results[:1]] == ["pretrained"]
    with pytest.raises(UserError, match="give --model"):
        evaluate(small(own))
    assert contents(tmp_path) == before


def test_another_encoder_as_baseline(options: Options, tiny: Pretrain, tmp_path: Path) -> None:
    """The run itself, by another way."""
    words = [str(options["run"]), "random"]
    found = list(knn(Knn(**options, baselines=words)))  # type: ignore[arg-type]
    assert [name for name, _ in found] == ["pretrained", *words]
    assert found[0][1] == found[1][1]


def test_many_encoders_make_several_tables_of_80_columns(options: Options) -> None:
    words = ["random", "pixels", str(options["run"])]
    text = str(evaluate(small(options, baselines=words, k=(1,), shots=(1,), attentive=False)))
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert text.count("kNN, k = 1") == 2


def test_names_that_are_no_text_can_be_printed(options: Options, tmp_path: Path) -> None:
    data = Path(str(options["data"])).rename(tmp_path / "tiles\udcff")
    text = str(evaluate(small({**options, "data": str(data)}, k=(1,), shots=(1,), attentive=False, layers=0)))
    assert f"{tmp_path}/tiles\\udcff: 72 training" in text.encode().decode()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ()),
        (["--baselines"], TRIVIAL),
        (["--baselines", "--k", "3"], TRIVIAL),
        (["--baselines", "random"], ("random",)),
        (
            ["--baselines", "pixels", "vit_small_patch16_224.augreg_in21k"],
            ("pixels", "vit_small_patch16_224.augreg_in21k"),
        ),
    ],
)
def test_baselines_by_one_flag(words: list[str], expected: tuple[str, ...]) -> None:
    found = tyro.cli(Evaluate, args=["run", "--data", "d", *words], config=(tyro.conf.OmitArgPrefixes,))
    assert found.baselines == expected
    assert Evaluate(run="r", data="d", baselines=True) == Evaluate(run="r", data="d", baselines=TRIVIAL)
    assert Evaluate(run="r", data="d", baselines=False).baselines == ()
    assert replace(found, seed=1).baselines == expected
