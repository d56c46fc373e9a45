"""Five channels of 16 bits, and one, from pre-training to a classifier in use."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from leanmim.classifier.finetune import finetune
from leanmim.classifier.predict import predict
from leanmim.config import Export, Finetune, Knn, Predict, Pretrain, Probe
from leanmim.errors import UserError
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe
from leanmim.formats import export
from leanmim.recipes import FASTMIM
from leanmim.run import Run, load
from leanmim.start import open_start
from leanmim.train.pretrain import pretrain
from tests.helpers import equal
from tests.runs import pretrain_until, untrained, weights


@pytest.fixture
def spectra(tmp_path: Path) -> Path:
    """Two classes that differ in the fourth channel only: 12 to train with, and 6 to validate with."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name, level in (("dry", 9000), ("wet", 14000)):
            folder = tmp_path / "spectra" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                values = draw.normal(11000, 500, (5, 34, 40))
                values[3] += level - 11000
                np.save(folder / f"{i}.npy", values.astype(np.uint16))
    return tmp_path / "spectra"


@pytest.fixture
def five(tiny: Pretrain, spectra: Path) -> Pretrain:
    return replace(tiny, data=str(spectra / "train"), channels=5)


def test_from_pretraining_to_a_classifier_in_use(
    five: Pretrain, spectra: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(replace(five, knn_data=str(spectra)))
    every = np.stack([np.load(path) for path in sorted((spectra / "train").rglob("*.npy"))]).astype(np.float64)
    state = load(Run(Path(five.out)).last)
    np.testing.assert_allclose(state["mean"], every.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(state["std"], every.std((0, 2, 3)), rtol=1e-9)
    assert f"normalised by --mean {state['mean'][0]:.6g}" in capsys.readouterr().out
    machine = dict(device="cpu", workers=0)
    accuracies = dict(knn(Knn(run=five.out, data=str(spectra), k=3, baselines=("random", "pixels"), **machine)))  # type: ignore[arg-type]
    assert accuracies["pretrained"] == 1

    tuned = str(tmp_path / "tuned")
    finetune(Finetune(start=five.out, data=str(spectra), out=tuned, epochs=4, batch_size=6, blr=0.1, **machine))  # type: ignore[arg-type]
    best = load(Run(Path(tuned)).best)
    assert best["accuracy"] == 1 and (best["mean"], best["std"]) == (state["mean"], state["std"])

    shares = []
    for i, run in enumerate((tuned, str(export(Export(run=tuned, out=str(tmp_path / "exported")))))):
        table = predict(Predict(run=run, images=(str(spectra / "val"),), out=str(tmp_path / f"{i}.csv"), **machine))  # type: ignore[arg-type]
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert [row["class"] for row in rows] == ["dry"] * 3 + ["wet"] * 3
        shares.append([float(row["probability"]) for row in rows])
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    known = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert known["pretrained_cfg"]["mean"] == state["mean"] and known["pretrained_cfg"]["std"] == state["std"]
    assert known["pretrained_cfg"]["input_size"] == [5, 32, 32]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    with torch.inference_mode():
        assert loaded(torch.zeros(1, 5, 32, 32)).shape == (1, 2)


@pytest.mark.results
def test_hog_of_five_channels_is_learned_and_drawn(five: Pretrain) -> None:
    pretrain(replace(five, recipe="fastmim", masking="pixel", mask_unit=8, target=FASTMIM.target, hog_cell=4))
    head = next(
        value for name, value in reversed(weights(five).items()) if name.startswith("decoders") and value.ndim == 2
    )
    assert head.shape[0] == 2 * 2 * 5 * 9
    assert (Path(five.out) / "reconstructions.png").is_file()


def test_a_killed_run_continues_bit_for_bit(five: Pretrain, tmp_path: Path) -> None:
    pretrain(five)
    other = replace(five, out=str(tmp_path / "killed"))
    pretrain_until(other, 4)
    pretrain(other)
    assert equal(weights(five), weights(other))


def test_one_channel_of_16_bits_keeps_them(tiny: Pretrain, tmp_path: Path) -> None:
    """Steps of 1/65535 of the range, far below one of 8 bits."""
    for name, level in (("low", 30000), ("high", 30016)):
        for part in ("train", "val"):
            (tmp_path / "grey" / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((32, 32), level + i, np.uint16)
                np.save(tmp_path / "grey" / part / name / f"{i}.npy", pixels)
    config = replace(tiny, data=str(tmp_path / "grey"), channels=1, values="stored", mean=(30009.0,), std=(8.0,))
    pretrain(config)
    found = open_start(str(export(Export(run=config.out, out=str(tmp_path / "exported"), overwrite=True))))
    assert (found.model.read_as, found.mean, found.std) == (1, [30009.0], [8.0])
    for run in (config.out, str(tmp_path / "exported")):
        (accuracy,) = dict(knn(Knn(run=run, data=str(tmp_path / "grey"), k=1, device="cpu", workers=0))).values()
        assert accuracy == 1


def test_the_protocol_of_maes_probe(five: Pretrain, spectra: Path) -> None:
    config = Probe(
        run=str(untrained(five)), data=str(spectra), solver="lars", epochs=20, warmup_epochs=2, device="cpu", workers=0
    )
    assert dict(probe(config))["pretrained"] == 1


def test_a_start_that_knows_no_values_needs_their_numbers(tiny: Pretrain, spectra: Path, tmp_path: Path) -> None:
    own = dict(model=tiny.model, model_kwargs=tiny.model_kwargs, input_size=(32,), data=str(spectra), device="cpu")
    with pytest.raises(UserError, match=r"leanmim stats --data DATA --channels 5 --out"):
        list(knn(Knn(run="scratch", channels=5, workers=0, k=3, **own)))  # type: ignore[arg-type]
    numbers = dict(channels=5, values="stored", mean=[11e3] * 5, std=[500.0] * 5)
    (tmp_path / "s.json").write_text(json.dumps(numbers))
    found = dict(knn(Knn(run="scratch", stats=str(tmp_path / "s.json"), workers=0, k=3, **own)))  # type: ignore[arg-type]
    assert found["pretrained"] == 1
    config = Finetune(
        start="scratch",
        out=str(tmp_path / "tuned"),
        stats=str(tmp_path / "s.json"),
        epochs=1,
        batch_size=6,
        workers=0,
        **own,
    )  # type: ignore[arg-type]
    for _ in range(2):  # it is finished then
        finetune(config)
        stored = json.loads((tmp_path / "tuned" / "config.json").read_text())
        assert {name: stored[name] for name in numbers} == numbers
    assert load(Run(Path(config.out)).last)["mean"] == numbers["mean"]


def test_what_contradicts_a_run_is_refused(five: Pretrain, spectra: Path) -> None:
    own = dict(run=str(untrained(five)), data=str(spectra), device="cpu", workers=0)
    for options, message in (
        (dict(mean=(1.0,) * 5, std=(1.0,) * 5), "--stats, out"),
        (dict(channels=4), "leave --channels out"),
    ):
        with pytest.raises(UserError, match=message):
            list(knn(Knn(**own, **options)))  # type: ignore[arg-type]
