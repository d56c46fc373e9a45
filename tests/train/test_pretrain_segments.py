"""BIM: a run in segments, its log, its checkpoints, its depths."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanmim.config import Knn, Pretrain, Probe, Report
from leanmim.data import IMAGENET, Crops, Folder, Normalise, collate, epoch_order, seed_of
from leanmim.evaluators.knn import knn
from leanmim.evaluators.probe import probe
from leanmim.factory import build
from leanmim.page import report
from leanmim.run import Run, load
from leanmim.schedule import learning_rate
from leanmim.step import make_optimizers, update
from leanmim.train.pretrain import pretrain
from leanmim.weights import restore
from tests.helpers import PLAIN, equal, in_segments, of_segments, three_classes
from tests.process_faults import Fault, together


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """Two segments, eight steps."""
    out = tmp_path_factory.mktemp("bim") / "run"
    config = in_segments(segments=2, mask_ratio=(0.5, 0.75), out=str(out), blr=0.1)
    pretrain(config)
    return config


def lines(config: Pretrain) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def test_metrics_have_a_loss_for_each_segment(trained: Pretrain) -> None:
    written = lines(trained)
    assert [line["step"] for line in written] == list(range(1, 9))
    for line in written:
        losses = [line[key] for key in sorted(line) if key.startswith("loss_")]
        assert [key for key in sorted(line) if key.startswith("loss_")] == ["loss_0", "loss_1"]
        assert line["loss"] == pytest.approx(sum(losses) / 2) and all(0 < loss < 10 for loss in losses)


def test_interrupted_and_continued_is_bit_identical(
    trained: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And --offload, for which a CPU has no use, changes nothing."""
    config = replace(trained, out=str(tmp_path / "run"), checkpoint_minutes=0.0, offload=True)
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("leanmim.train.training.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert load(Run(Path(config.out)).last)["step"] == 3
    pretrain(config)
    said = capsys.readouterr().out
    assert "continuing after step 3" in said and "nothing to offload: cpu has no memory of its own" in said
    one, two = load(Run(Path(config.out)).last), load(Run(Path(trained.out)).last)
    assert one["step"] == two["step"] == 8
    for key in ("model", "optimizers"):
        assert equal(one[key], two[key])
    keep = ("step", "loss", "loss_0", "loss_1", "lr")
    assert [[line[key] for key in keep] for line in lines(config)] == [
        [line[key] for key in keep] for line in lines(trained)
    ]


def test_depths_are_evaluated_and_compared_in_the_report(
    trained: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanmim.evaluators.features.latency", lambda embed, image: 0.25)
    title = "Accuracy against depth"
    run = Run(Path(trained.out))
    options = dict(run=trained.out, data=three_classes(tmp_path), device="cpu", workers=0)
    assert title not in (run.folder / "report.html").read_text()
    assert list(knn(Knn(**options, k=1, depth=2))) == [("pretrained", 1.0)]  # each image finds itself
    assert title not in report(Report(runs=(trained.out,))).read_text()
    assert dict(knn(Knn(**options, k=1, baselines=True)))["pretrained"] == 1.0
    page = report(Report(runs=(trained.out,))).read_text()
    assert title in page and "kNN (%) against depth" in page and "linear probe (%) against depth" not in page
    for depth in (2, 4):
        ((name, accuracy),) = probe(Probe(**options, solver="fast", depth=depth))
        assert (name, accuracy) == ("pretrained", 1.0)
    assert "linear probe (%) against depth" in report(Report(runs=(trained.out,))).read_text()

    written = [json.loads(line) for line in run.evaluations.read_text().splitlines()]
    facts = [line for line in written if "depth" in line]
    assert [(line["what"], line["name"], line["depth"]) for line in facts] == [
        ("knn", "pretrained", 2), ("knn", "pretrained", 4), ("probe", "pretrained", 2), ("probe", "pretrained", 4),
    ]  # fmt: skip
    _, model, _ = restore(trained.out)
    vit = model.encoder.backbone
    block = sum(p.numel() for p in vit.blocks[0].parameters())
    whole = sum(p.numel() for p in vit.parameters())
    assert [line["parameters"] for line in facts] == [whole - 2 * block, whole] * 2
    assert [line["latency_ms"] for line in facts] == [250.0] * 4


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    """By the clock of one of them a checkpoint is always due; they agree."""
    config = in_segments(
        segments=2, mask_ratio=(0.5, 0.75), out=str(tmp_path / "run"), epochs=1, blr=0.1, warmup_epochs=0.0,
        clip_grad=0.5,
    )  # fmt: skip
    options = {
        "data": config.data, "out": config.out, "model": config.model, "input-size": 32, "segments": 2,
        "decoder-depth": 1, "decoder-width": 32, "decoder-heads": 2, "epochs": 1, "batch-size": 4, "workers": 0,
        "device": "cpu", "blr": 0.1, "warmup-epochs": 0, "clip-grad": 0.5,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    words += ["--mask-ratio", "0.5", "0.75", "--model-kwargs", *(str(part) for pair in PLAIN.items() for part in pair)]
    done = together(tmp_path, ["pretrain", "bim", *words], faults=[Fault("hurried", 1, 0)])
    assert done.codes == [0, 0], done.texts

    torch.manual_seed(0)
    model = build(config).train()
    optimizers = make_optimizers(model, config)
    data = Crops(Folder(config.data, 3), (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=0)
    normalise, order = Normalise(*IMAGENET[3], torch.device("cpu")), epoch_order(16, 0, 0)
    for step in range(2):
        for rank in range(2):
            start = (2 * step + rank) * 4
            images, _ = collate([data[0, index] for index in order[start : start + 4].tolist()])
            torch.manual_seed(seed_of(0, rank, step, 0))
            (sum(model.losses(normalise(images))) / 2).backward()
        for optimizer, parameters in zip(optimizers, of_segments(optimizers), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 2, 0.0, 0.1 * 8 / 256)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in load(Run(Path(config.out)).last)["model"].items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=2e-6), name
