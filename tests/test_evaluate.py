"""Evaluators of a frozen encoder: against scikit-learn, brute force and timm's own features."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm.optim
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from leanmim.checkpoint import Run, load_backbone, save, write_json
from leanmim.config import Knn, Pretrain, Probe
from leanmim.data import Labelled, Normalise, centre_crop, labelled_pair
from leanmim.errors import UserError
from leanmim.evaluate import probe as probe_module
from leanmim.evaluate.features import (
    Features,
    Subject,
    embedding,
    extract,
    random_backbone,
    raw_pixels,
    subjects,
)
from leanmim.evaluate.knn import knn, knn_accuracy
from leanmim.evaluate.probe import fast_probe, lars_probe, probe
from leanmim.mim import build

CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue")
# Python 3.12 warns of every fork of a process that has threads
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def untrained(config: Pretrain, seed: int = 5) -> Path:
    """A run folder of a model before its first step, not of the run's own seed."""
    run = Run(Path(config.out))
    torch.manual_seed(seed)
    model = build(config)
    c = config.channels
    state = dict(
        config=config.to_json(), step=0, mean=[0.5] * c, std=[0.25] * c, model=model.state_dict(), optimizers=[]
    )
    write_json(run.config, config.to_json())
    save(run.last, state)
    return run.folder


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Noisy tiles of three colours: 24 of each to train on, 8 to validate."""
    root, draw = tmp_path / "tiles", np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name in COLOURS:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = np.array(Image.new("RGB", (16, 16), name), dtype=float)
                pixels = np.clip(colour + draw.normal(0, 40, colour.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def options(tiny: Pretrain, tiles: Path) -> dict[str, object]:
    """Where and how to evaluate an untrained run."""
    return dict(run=str(untrained(tiny)), data=str(tiles), device="cpu", workers=0)


def clusters(n: int, classes: int, spread: float, seed: int, width: int = 16) -> Features:
    """Points around one centre for each class; the centres are always the same."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    draw = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = centres[y] + draw.normal(0, spread, (n, width))
    return Features(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


# kNN


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5), (200, 0.07), (7, 5.0)])
def test_knn_is_that_of_scikit_learn(k: int, temperature: float) -> None:
    train, val = clusters(200, 5, 1.5, 1), clusters(90, 5, 1.5, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = theirs.fit(train.x.numpy(), train.y.numpy()).score(val.x.numpy(), val.y.numpy())
    assert 0.3 < expected < 0.95
    assert knn_accuracy(train, val, k, temperature) == pytest.approx(expected, abs=1e-9)


def test_knn_is_that_of_a_loop_over_the_definition() -> None:
    train, val = clusters(60, 4, 1.5, 1), clusters(40, 4, 1.5, 2)
    right = 0
    for x, label in zip(val.x.double(), val.y.tolist(), strict=True):
        similarity = [
            (float(x @ other / x.norm() / other.norm()), int(y))
            for other, y in zip(train.x.double(), train.y, strict=True)
        ]
        votes = [0.0] * 4
        for s, y in sorted(similarity, reverse=True)[:9]:
            votes[y] += math.exp(s / 0.1)
        right += votes.index(max(votes)) == label
    assert knn_accuracy(train, val, 9, 0.1) == right / 40


def test_knn_on_separable_clusters_is_perfect() -> None:
    assert knn_accuracy(clusters(50, 5, 0.01, 1), clusters(25, 5, 0.01, 2), k=5) == 1.0


def test_knn_on_noise_is_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = [Features(torch.randn(n, 8, generator=draw), torch.arange(n) % 4) for n in (800, 1000)]
    assert knn_accuracy(*noise) == pytest.approx(0.25, abs=0.06)


def test_more_neighbours_than_images_are_all_images() -> None:
    train, val = clusters(12, 3, 1.0, 1), clusters(30, 3, 1.0, 2)
    assert knn_accuracy(train, val, k=1000) == knn_accuracy(train, val, k=12)


def test_a_minute_temperature_is_one_neighbour() -> None:
    """exp(similarity / temperature) alone would be infinite."""
    train, val = clusters(100, 5, 1.5, 1), clusters(80, 5, 1.5, 2)
    assert knn_accuracy(train, val, k=20, temperature=1e-4) == knn_accuracy(train, val, k=1)


def test_knn_sees_directions_only() -> None:
    train, val = clusters(100, 5, 1.5, 1), clusters(80, 5, 1.5, 2)
    scaled = Features(train.x * torch.rand(100, 1).add(0.1) * 50, train.y)
    assert knn_accuracy(scaled, val) == knn_accuracy(train, val)


def test_validation_sets_larger_than_a_chunk() -> None:
    train, val = clusters(50, 5, 1.0, 1), clusters(1500, 5, 1.0, 2)
    parts = [knn_accuracy(train, Features(val.x[a : a + 500], val.y[a : a + 500])) for a in (0, 500, 1000)]
    assert knn_accuracy(train, val) == pytest.approx(sum(parts) / 3)


def test_a_class_that_training_has_not_is_never_right() -> None:
    train, val = clusters(20, 2, 0.01, 1), clusters(20, 4, 0.01, 2)
    assert knn_accuracy(train, val, k=3) == 0.5


# The fast probe


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_fast_probe_is_that_of_scikit_learn(c: float) -> None:
    train, val = clusters(150, 5, 1.5, 1), clusters(100, 5, 1.5, 2)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
    expected = theirs.fit(train.x.numpy(), train.y.numpy()).score(val.x.numpy(), val.y.numpy())
    assert 0.3 < expected < 0.99
    assert fast_probe(train, val, c) == expected


def test_fast_probe_on_separable_clusters_is_perfect() -> None:
    assert fast_probe(clusters(50, 5, 0.01, 1), clusters(25, 5, 0.01, 2)) == 1.0


def test_fast_probe_ignores_the_scale_of_a_feature() -> None:
    train, val = clusters(150, 5, 1.5, 1), clusters(100, 5, 1.5, 2)
    scale, shift = torch.logspace(-3, 3, 16), torch.arange(16.0)
    moved = [Features(part.x * scale + shift, part.y) for part in (train, val)]
    assert fast_probe(*moved) == pytest.approx(fast_probe(train, val), abs=0.011)


# The LARS probe


def lars_setting(tiny: Pretrain, tiles: Path, **more: object) -> tuple[nn.Module, Subject, Probe]:
    config = Probe(untrained(tiny).as_posix(), str(tiles), **{"epochs": 30, **more})  # type: ignore[arg-type]
    backbone, trained, _ = load_backbone(config.run)
    train, val = labelled_pair(tiles, 3, centre_crop(trained.size))
    normalise = Normalise([0.5] * 3, [0.25] * 3, CPU)
    return backbone, Subject("pretrained", embedding(backbone, "avg"), train, val, normalise, 0), config


def test_lars_probe_tells_colours_apart_and_leaves_the_encoder_alone(tiny: Pretrain, tiles: Path) -> None:
    backbone, subject, config = lars_setting(tiny, tiles)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    assert lars_probe(subject, config) >= 0.9
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_lars_probe_has_a_norm_without_affine_and_trains_one_linear_layer(
    tiny: Pretrain, tiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the optimizer's step is MAE's: weights by trust ratio, biases as they are."""
    norms: list[dict[str, object]] = []
    optimizers: list[timm.optim.Lars] = []
    Norm, Lars = nn.BatchNorm1d, timm.optim.Lars

    def norm(width: int, **options: object) -> nn.Module:
        norms.append({"width": width, **options})
        return Norm(width, **options)  # type: ignore[arg-type]

    def lars(*args: object, **options: object) -> timm.optim.Lars:
        optimizers.append(Lars(*args, **options))
        return optimizers[-1]

    monkeypatch.setattr(nn, "BatchNorm1d", norm)
    monkeypatch.setattr(probe_module, "Lars", lars)
    _, subject, config = lars_setting(tiny, tiles, epochs=1, warmup_epochs=0, blr=0.2)
    lars_probe(subject, config)
    assert norms == [{"width": 32, "affine": False, "eps": 1e-6}]

    (optimizer,) = optimizers
    (weight,), (bias,) = (group["params"] for group in optimizer.param_groups)
    assert weight.shape == (3, 32)
    assert bias.shape == (3,)
    # warmed up at once: the first step has the rate of the full batch, 0.2 * 16384 / 256
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(12.8)] * 2
    optimizer.state.clear()
    start = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = torch.randn(3, 32), torch.randn(3)
    optimizer.step()
    trust = 0.001 * start[0].norm() / weight.grad.norm()
    torch.testing.assert_close(weight.detach(), start[0] - 12.8 * trust * weight.grad)
    torch.testing.assert_close(bias.detach(), start[1] - 12.8 * bias.grad)


def test_lars_probe_reads_each_epoch_in_another_order_and_crop(tiny: Pretrain, tiles: Path) -> None:
    seen: list[Tensor] = []
    _, subject, config = lars_setting(tiny, tiles, epochs=2)
    embed = subject.embed

    def watch(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return embed(images)

    lars_probe(subject._replace(embed=watch), config)
    *training, _ = seen
    first, second = torch.cat(training).chunk(2)
    assert first.shape == (64, 3, 32, 32)  # of 72 images the last 8 do not fill a batch
    assert not torch.equal(first, second)


def test_lars_probe_of_a_set_smaller_than_a_batch(tiny: Pretrain, tiles: Path) -> None:
    _, subject, config = lars_setting(tiny, tiles, batch_size=50, epochs=2)
    small = Labelled(tiles / "val", 3, subject.val.transform)
    assert 0 <= lars_probe(subject._replace(train=small), config) <= 1


# Features


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


def swin(tiny_simmim: Pretrain, **more: object) -> Pretrain:
    """The smallest Swin whose heads divide its width."""
    return replace(
        tiny_simmim, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, mask_unit=32, **more
    )


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


# The commands


def test_baselines(options: dict[str, object]) -> None:
    found = dict(knn(Knn(**options, baselines=True)))  # type: ignore[arg-type]
    assert list(found) == ["pretrained", "random", "pixels"]
    assert found["pixels"] == 1.0
    assert dict(knn(Knn(**options))) == {"pretrained": found["pretrained"]}  # type: ignore[arg-type]


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


@pytest.mark.parametrize("solver", ["fast", "lars"])
def test_probe_command(solver: str, options: dict[str, object]) -> None:
    config = Probe(**options, solver=solver, epochs=30)  # type: ignore[arg-type]
    ((name, accuracy),) = probe(config)
    assert name == "pretrained"
    assert accuracy >= 0.9
    assert list(probe(config)) == [(name, accuracy)]


def test_results_are_written_down(options: dict[str, object]) -> None:
    measures = [Knn(**options, k=3, baselines=True), Probe(**options, solver="fast", c=0.5)]  # type: ignore[arg-type]
    found = [("knn", measures[0], *pair) for pair in knn(measures[0])]
    found += [("probe", measures[1], *pair) for pair in probe(measures[1])]  # type: ignore[arg-type]
    lines = map(json.loads, Run(Path(str(options["run"]))).evaluations.read_text().splitlines())
    for line, (what, config, name, value) in zip(lines, found, strict=True):
        expected = json.loads(json.dumps(asdict(config)))
        assert line == {"what": what, "name": name, "value": value, "data": options["data"], "options": expected}


@forks
@pytest.mark.parametrize("what", ["knn", "lars"])
def test_workers_change_nothing(what: str, options: dict[str, object]) -> None:
    """Compared at features too hard to be told apart without error."""

    def measure(workers: int) -> list[tuple[str, float]]:
        own = {**options, "workers": workers}
        if what == "knn":
            return list(knn(Knn(**own, k=2, batch_size=10)))  # type: ignore[arg-type]
        return list(probe(Probe(**own, epochs=2, warmup_epochs=1, blr=0.01)))  # type: ignore[arg-type]

    assert measure(0) == measure(0) == measure(1)


SIZES: list[tuple[int, ...]] = [(48,), (40, 24), (64,)]


@pytest.mark.parametrize("size", SIZES)
def test_another_input_size_of_a_vit(size: tuple[int, ...], options: dict[str, object]) -> None:
    ((_, accuracy),) = knn(Knn(**options, input_size=size))  # type: ignore[arg-type]
    assert accuracy >= 0.9


# timm's, when it resizes tables of relative positions
@pytest.mark.filterwarnings("ignore:.*searchsorted.*:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
def test_another_input_size_of_a_swin(tiny_simmim: Pretrain, tiles: Path) -> None:
    run = str(untrained(swin(tiny_simmim)))
    for size in ((128,), (64, 96)):
        config = Knn(run, str(tiles), input_size=size, device="cpu", workers=0, baselines=True)
        found = dict(knn(config))
        assert found["pretrained"] >= 0.9
        assert set(found) == {"pretrained", "random", "pixels"}


def test_the_input_size_of_pre_training_is_the_default(options: dict[str, object]) -> None:
    for sizes in ((), (32,), (32, 32)):
        (subject,) = subjects(Knn(**options, input_size=sizes))  # type: ignore[arg-type]
        assert subject.train[0][0].shape == (3, 32, 32)


def test_grey_images(tiny: Pretrain, tiles: Path) -> None:
    run = untrained(replace(tiny, channels=1))
    ((_, accuracy),) = knn(Knn(str(run), str(tiles), device="cpu", workers=0))
    assert accuracy > 0.5


# Bad input


Break = Callable[[Path], None]
BREAKS: dict[str, tuple[Break, str]] = {
    "no val": (lambda root: (root / "val").rename(root / "test"), r"has no folder 'val'; .*train/CLASS and val/CLASS"),
    "broken image": (
        lambda root: (root / "train/red/3.png").write_bytes(b"?") and None,
        r"red/3\.png cannot be read.*remove",
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "--k 0 is out of range; it is at least 1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"workers": -2}, "--workers -2"),
        ({"crop": 1.5}, "--crop 1.5 is out of range; it is at least 0.01, at most 1"),
        ({"input_size": (32, 32, 32)}, "--input-size takes one number or two"),
        ({"input_size": (-32,)}, "--input-size -32 must be positive"),
        ({"epochs": 0}, "--epochs 0"),
        ({"warmup_epochs": -1}, "--warmup-epochs -1"),
        ({"probe_batch_size": 1}, "--probe-batch-size 1"),
        ({"c": 0.0}, "--c 0.0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_values_that_cannot_be(wrong: dict[str, object], message: str, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=message):
        list(probe(Probe(**{**options, **wrong})))  # type: ignore[arg-type]
