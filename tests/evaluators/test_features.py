"""Features of a frozen encoder: timm's own, in the order of the files; and what both evaluators share."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leanmim.config import Knn, Pretrain, Probe
from leanmim.data import Normalise, centre_crop, labelled_pair
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.features import embedding, extract, random_backbone, raw_pixels, subjects
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe
from leanmim.factory import build
from leanmim.run import Run
from tests.evaluators.samples import COLOURS, CPU, forks, swin


def shaken(config: Pretrain) -> nn.Module:
    """A backbone none of whose weights is trivial."""
    torch.manual_seed(0)
    backbone = build(config).encoder.backbone.eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("registers", [0, 4])
def test_pools_of_a_vit(registers: int, tiny: Pretrain, images: Tensor) -> None:
    backbone = shaken(replace(tiny, model_kwargs={**tiny.model_kwargs, "reg_tokens": registers}))
    with torch.no_grad():
        tokens = backbone.forward_features(images)
        assert tokens.shape == (2, 1 + registers + 16, 32)
        torch.testing.assert_close(embedding(backbone, "avg")(images), tokens[:, -16:].mean(1))
        torch.testing.assert_close(embedding(backbone, "token")(images), tokens[:, 0])
        torch.testing.assert_close(embedding(backbone, "timm")(images), backbone(images))
        torch.testing.assert_close(embedding(backbone, "token")(images), backbone(images))  # a ViT's own choice


@pytest.mark.parametrize("class_token", [True, False])
def test_avg_is_timms_own_output_where_timm_averages(class_token: bool, tiny: Pretrain, images: Tensor) -> None:
    """timm's norm then comes after the pooling."""
    options = {**tiny.model_kwargs, "class_token": class_token, "global_pool": "avg"}
    backbone = shaken(replace(tiny, model_kwargs=options))
    with torch.no_grad():
        torch.testing.assert_close(embedding(backbone, "avg")(images), backbone(images))


def test_avg_of_a_swin_is_timms_own_output(tiny_simmim: Pretrain) -> None:
    backbone = shaken(swin(tiny_simmim))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = embedding(backbone, "avg")(images)
        torch.testing.assert_close(features, backbone(images))
        torch.testing.assert_close(features, backbone.forward_features(images).mean((1, 2)))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_no_class_token_to_pool(kind: str, tiny: Pretrain, tiny_simmim: Pretrain) -> None:
    plain = replace(tiny, model_kwargs={**tiny.model_kwargs, "class_token": False, "global_pool": "avg"})
    backbone = build(plain if kind == "vit" else swin(tiny_simmim)).encoder.backbone
    with pytest.raises(UserError, match=r"--pool token: this model has no class token; use avg"):
        embedding(backbone, "token")


def test_raw_pixels(images: Tensor) -> None:
    torch.testing.assert_close(raw_pixels(images), images.flatten(1))
    large = nn.functional.interpolate(images, scale_factor=3)
    torch.testing.assert_close(raw_pixels(large), images.flatten(1))
    assert raw_pixels(torch.zeros(1, 1, 20, 28)).shape == (1, 560)


def test_extract_keeps_the_order_of_the_files(tiles: Path) -> None:
    _, val = labelled_pair(tiles, 3, centre_crop((16, 16)))
    normalise = Normalise([0.0] * 3, [1.0] * 3, CPU)
    found = extract(raw_pixels, val, normalise, 7, 0)
    assert found.y.tolist() == [label for label in range(3) for _ in range(8)]
    assert val.classes == sorted(COLOURS)
    colours = found.x.view(24, 3, -1).mean(-1)  # blue, green (half as bright), red
    assert colours.argmax(1).tolist() == [2] * 8 + [1] * 8 + [0] * 8
    assert not found.x.requires_grad


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("solver", ["knn", "fast", "lars"])
def test_bars_say_how_many_images_are_read(
    solver: str, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**options, "batch_size": 24}
    if solver == "knn":
        list(knn(Knn(**small)))  # type: ignore[arg-type]
    else:
        list(probe(Probe(**small, solver=solver, epochs=2)))  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("pretrained features of 72 images" in err) == (solver != "lars")
    assert "pretrained features of 24 images" in err
    assert ("logistic regression on 72 features" in err) == (solver == "fast")
    # the lars solver says beforehand what it will take
    assert ("MAE's protocol, 2 epochs of 72 images, 2 steps of 64 images" in err) == (solver == "lars")


def test_the_random_baseline_is_the_run_before_its_first_step(tiny: Pretrain) -> None:
    torch.manual_seed(tiny.seed)
    expected = build(tiny).encoder.backbone.state_dict()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    found = random_backbone(tiny, tiny.size)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not found.training
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_encoders_are_in_evaluation_mode(options: dict[str, object]) -> None:
    for subject in subjects(Knn(**options, baselines=True, pool="timm")):  # type: ignore[arg-type]
        assert subject.name == "pixels" or (isinstance(subject.embed, nn.Module) and not subject.embed.training)


def test_results_are_written_down(options: dict[str, object]) -> None:
    measures = [Knn(**options, k=3, baselines=True), Probe(**options, solver="fast", c=0.5)]  # type: ignore[arg-type]
    found = [("knn", measures[0], *pair) for pair in knn(measures[0])]
    found += [("probe", measures[1], *pair) for pair in probe(measures[1])]  # type: ignore[arg-type]
    lines = map(json.loads, Run(Path(str(options["run"]))).evaluations.read_text().splitlines())
    for line, (what, config, name, value) in zip(lines, found, strict=True):
        expected = json.loads(json.dumps(asdict(config))) | {"pool": "avg", "input_size": [32, 32]}
        assert line == {
            "what": what, "name": name, "value": value, "interval": list(value.interval), "images": 24,
            "data": options["data"], "options": expected, "step": 0,
        }  # fmt: skip


@forks
@pytest.mark.parametrize("what", ["knn", "lars"])
def test_workers_change_nothing(what: str, options: dict[str, object]) -> None:
    """Compared at features too hard to be told apart without error."""

    def measure(workers: int) -> list[tuple[str, Accuracy]]:
        own = {**options, "workers": workers}
        if what == "knn":
            return list(knn(Knn(**own, k=2, batch_size=10)))  # type: ignore[arg-type]
        return list(probe(Probe(**own, solver="lars", epochs=2, warmup_epochs=1, blr=0.01)))  # type: ignore[arg-type]

    assert measure(0) == measure(0) == measure(1)


def test_the_input_size_of_pre_training_is_the_default(options: dict[str, object]) -> None:
    for sizes in ((), (32,), (32, 32)):
        (subject,) = subjects(Knn(**options, input_size=sizes))  # type: ignore[arg-type]
        assert subject.train[0][0].shape == (3, 32, 32)


Break = Callable[[Path], None]


BREAKS: dict[str, tuple[Break, str]] = {
    "no train": (
        lambda root: (root / "train").rename(root / "test"),
        r"has no folder 'train', .*train/CLASS and val/CLASS",
    ),
    "new class": (lambda root: (root / "val/red").rename(root / "val/pink"), r"classes that training has not: pink"),
    "no class": (
        lambda root: (root / "val/red/0.png").rename(root / "val/0.png") and None,
        r"outside of class folders",
    ),
}


@forks
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", BREAKS)
def test_a_labelled_folder_out_of_order(what: str, workers: int, options: dict[str, object]) -> None:
    spoil, message = BREAKS[what]
    spoil(Path(str(options["data"])))
    own = {**options, "workers": workers}
    with pytest.raises(UserError, match=message):
        list(knn(Knn(**own)))  # type: ignore[arg-type]
    for solver in ("fast", "lars"):
        with pytest.raises(UserError, match=message):
            list(probe(Probe(**own, solver=solver)))  # type: ignore[arg-type]
    assert not Run(Path(str(options["run"]))).evaluations.exists()
