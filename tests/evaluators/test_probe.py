"""The linear probe: against scikit-learn and MAE's protocol."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm.optim
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from leanmim.config import Knn, Pretrain, Probe
from leanmim.data import Labelled, Normalise, centre_crop, labelled_pair
from leanmim.evaluators import probe as probe_module
from leanmim.evaluators.features import Features, Subject, embedding
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import fast_probe, lars_probe, probe
from leanmim.run import load
from leanmim.weights import load_backbone
from tests.evaluators.samples import CPU, clusters
from tests.runs import untrained


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_fast_probe_is_that_of_scikit_learn(c: float) -> None:
    train, val = clusters(150, 5, 1.5, 1), clusters(100, 5, 1.5, 2)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
    expected = theirs.fit(train.x.numpy(), train.y.numpy()).score(val.x.numpy(), val.y.numpy())
    assert 0.3 < expected < 0.99
    found = fast_probe(train, val, c)
    assert (found, found.images) == (expected, 100)


def test_fast_probe_on_separable_clusters_is_perfect() -> None:
    assert fast_probe(clusters(50, 5, 0.01, 1), clusters(25, 5, 0.01, 2)) == 1.0


def test_fast_probe_ignores_the_scale_of_a_feature() -> None:
    train, val = clusters(150, 5, 1.5, 1), clusters(100, 5, 1.5, 2)
    scale, shift = torch.logspace(-3, 3, 16), torch.arange(16.0)
    moved = [Features(part.x * scale + shift, part.y) for part in (train, val)]
    assert fast_probe(*moved) == pytest.approx(fast_probe(train, val), abs=0.011)


def lars_setting(tiny: Pretrain, tiles: Path, **more: object) -> tuple[nn.Module, Subject, Probe]:
    own = {"epochs": 30, **more}
    config = Probe(run=str(untrained(tiny)), data=str(tiles), **own)  # type: ignore[arg-type]
    backbone, trained, _ = load_backbone(config.run)
    train, val = labelled_pair(tiles, 3, centre_crop(trained.size))
    normalise = Normalise([0.5] * 3, [0.25] * 3, CPU)
    return (
        backbone,
        Subject("pretrained", embedding(backbone, "avg"), train, val, normalise, 0, 0, size=tiny.size),
        config,
    )


def test_lars_probe_tells_colours_apart_and_leaves_the_encoder_alone(tiny: Pretrain, tiles: Path) -> None:
    backbone, subject, config = lars_setting(tiny, tiles)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    found = lars_probe(subject, config)
    assert found >= 0.9 and found.images == 24
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
    _, subject, config = lars_setting(tiny, tiles, epochs=1, warmup_epochs=0, blr=51.2)
    lars_probe(subject, config)
    assert norms == [{"width": 32, "affine": False, "eps": 1e-6}]

    (optimizer,) = optimizers
    (weight,), (bias,) = (group["params"] for group in optimizer.param_groups)
    assert weight.shape == (3, 32)
    assert bias.shape == (3,)
    # warmed up at once: the first step has the rate of the batch, 51.2 * 64 / 256
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


@pytest.mark.parametrize("solver", ["fast", "lars", "attentive"])
def test_probe_command(solver: str, options: dict[str, object]) -> None:
    config = Probe(**options, solver=solver, epochs=30)  # type: ignore[arg-type]
    ((name, accuracy),) = probe(config)
    assert name == "pretrained"
    assert accuracy >= 0.9
    assert list(probe(config)) == [(name, accuracy)]


def test_a_stopped_lars_probe_continues_and_ends_alike(tiny: Pretrain, tiles: Path) -> None:
    """One step an epoch; every embedding of a batch is one step, the last one of each probe is that of the validation."""
    _, subject, config = lars_setting(tiny, tiles, epochs=12, checkpoint_minutes=0.0)
    folder = Path(config.run) / "probe" / "pretrained"
    whole = lars_probe(subject, config)
    expected = load(folder / "checkpoints" / "last.pt")
    calls = 0

    class Killed(Exception):
        pass

    def until_killed(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return subject.embed(images)

    with pytest.raises(Killed):
        lars_probe(subject._replace(embed=until_killed), replace(config, overwrite=True))
    assert load(folder / "checkpoints" / "last.pt")["step"] == 5
    assert lars_probe(subject, config) == whole
    again = load(folder / "checkpoints" / "last.pt")
    assert again["step"] == expected["step"] == 12
    assert all(torch.equal(value, again["head"][key]) for key, value in expected["head"].items())
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, 13)]


@pytest.mark.parametrize("change", ["options", "encoder"])
def test_a_lars_probe_of_other_options_or_another_encoder_starts_afresh(
    tiny: Pretrain, tiles: Path, change: str
) -> None:
    backbone, subject, config = lars_setting(tiny, tiles, epochs=2)
    subject = subject._replace(backbone=backbone)
    lars_probe(subject, config)
    calls: list[int] = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return subject.embed(images)

    lars_probe(subject._replace(embed=counted), config)
    assert len(calls) == 1  # the validation images only: it was finished
    if change == "options":
        config = replace(config, blr=0.05)
    else:
        with torch.no_grad():
            backbone.norm.bias += 0.1
    calls.clear()
    lars_probe(subject._replace(embed=counted), config)
    assert len(calls) == 3


def test_a_lars_probe_of_a_baseline_that_was_trained_anew_starts_afresh(
    options: dict[str, object], tiny: Pretrain, tmp_path: Path
) -> None:
    """With as many steps as before."""
    other = replace(tiny, out=str(tmp_path / "other"))
    config = Probe(**options, solver="lars", epochs=2, baselines=(other.out,))  # type: ignore[arg-type]
    last = Path(config.run) / "probe" / other.out.replace("/", "_") / "checkpoints" / "last.pt"
    heads = []
    for seed in (1, 2, 2):
        untrained(other, seed)
        list(probe(config))
        heads.append(load(last)["head"]["1.weight"])
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])


def test_brackets_in_a_name_are_no_markup(
    options: dict[str, object], tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On a terminal, where bars are drawn: rich would take a closing tag without its opening one for a mistake."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    other = str(untrained(replace(tiny, out=str(tmp_path / "a[" / "bold]")), seed=6))
    for own in (Knn(**options, baselines=(other,)), *(  # type: ignore[arg-type]
        Probe(**options, baselines=(other,), solver=solver, epochs=1)  # type: ignore[arg-type]
        for solver in ("fast", "lars", "attentive")
    )):  # fmt: skip
        found = knn(own) if isinstance(own, Knn) else probe(own)
        assert [name for name, _ in found] == ["pretrained", other]
        assert other in capsys.readouterr().err
