"""Fine-tuning as a whole: what it leaves, that it continues bit for bit, that bad data ends well."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.classifier import finetune as module
from leanmim.classifier.finetune import finetune
from leanmim.classifier.model import build_classifier
from leanmim.classifier.recipes import small_rate
from leanmim.config import Finetune, Knn, Pretrain, Show
from leanmim.errors import UserError
from leanmim.evaluators.knn import knn
from leanmim.loop import Stopped
from leanmim.pictures import show
from leanmim.run import Run, load
from leanmim.start import open_start
from leanmim.train.pretrain import pretrain
from tests.forks import launch, until
from tests.process_faults import together
from tests.runs import noisy_tiles, shown, untrained

COLOURS = ("red", "green", "blue")


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Noisy tiles of three colours, 8 to train with and 4 to validate with of each."""
    return noisy_tiles(tmp_path / "tiles", 8, 4, (40, 32))


@pytest.fixture
def config(tiny: Pretrain, tiles: Path, tmp_path: Path) -> Finetune:
    """Starts from an untrained run."""
    return Finetune(
        start=str(untrained(tiny)), data=str(tiles), out=str(tmp_path / "tuned"), epochs=3, batch_size=8, device="cpu", workers=0,
        log_every=1,
    )  # fmt: skip


def lines(config: Finetune) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def untimed(config: Finetune) -> list[dict[str, Any]]:
    timed = ("images_per_second", "data_wait", "memory_bytes", "seconds")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines(config)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def stopped_after(config: Finetune, steps: int, number: int = signal.SIGTERM) -> None:
    """Fine-tune from nothing until so many steps are done and a signal comes."""
    step, done = module.Tuning.step, 0

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module.Tuning, "step", counted)
        finetune(config)


def test_a_run_leaves_a_classifier_its_accuracy_and_its_mistakes(config: Finetune) -> None:
    config = replace(config, epochs=12, lr=3e-3)
    folder = finetune(config)
    results = json.loads((folder / "results.json").read_text())
    assert results["top1"] >= 0.9
    assert results["classes"] == sorted(COLOURS)
    assert np.sum(results["confusion"]) == 12
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert np.mean([row["label"] == row["class"] for row in rows]) == pytest.approx(results["top1"])
    for name in (
        "environment.json",
        "labels.json",
        "cost.json",
        "confusion.png",
        "report.html",
        "export/timm/config.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    drawn = [name for name in ("confusion", "mistakes") if (folder / f"{name}.png").exists()]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert shown(folder) == {name: [(last, (folder / f"{name}.png").read_bytes())] for name in drawn}

    found = open_start(str(folder))
    assert found.classes == tuple(sorted(COLOURS))
    image = torch.tensor(np.array(Image.new("RGB", (32, 32), "blue")) / 255.0).permute(2, 0, 1).float()
    normalised = (image - torch.tensor(found.mean)[:, None, None]) / torch.tensor(found.std)[:, None, None]
    assert sorted(COLOURS)[build_classifier(found)(normalised[None]).argmax()] == "blue"

    exported = build_classifier(open_start(str(folder / "export" / "timm")))
    assert equal(dict(exported.state_dict()), dict(build_classifier(found).state_dict()))


def test_resolved_numbers_are_stored(config: Finetune) -> None:
    folder = finetune(replace(config, epochs=1, batch_size="auto", mixup=0.3))
    stored = json.loads((folder / "config.json").read_text())
    assert stored["recipe"] == "small"
    assert "auto" not in [value for key, value in stored.items() if key not in ("device", "precision", "threads",
                          "channels_last", "compile", "memory", "pool", "class_weights", "values")]  # fmt: skip
    assert stored["mixup"] == 0.3
    assert (stored["batch_size"], stored["accum"], stored["input_size"], stored["channels"]) == (16, 1, [32], 3)
    assert stored["blr"] * 16 / 256 == pytest.approx(small_rate(16, False))


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_a_stopped_run_continues_and_ends_bit_identical(config: Finetune, tmp_path: Path, ema: float) -> None:
    config = replace(config, drop_path=0.2, mixup=0.8, cutmix=1.0, erase=0.25, ema=ema)
    whole = replace(config, out=str(tmp_path / "whole"))
    finetune(whole)
    stopped_after(config, 4)
    assert load(Run(Path(config.out)).last)["step"] == 4
    finetune(config)
    for name in ("last", "best"):
        states = [load(getattr(Run(Path(own.out)), name)) for own in (config, whole)]
        for state in states:
            state.pop("config")
        assert equal(*states), name
    assert untimed(config) == untimed(whole)
    assert (Path(config.out) / "predictions.csv").read_bytes() == (Path(whole.out) / "predictions.csv").read_bytes()


def test_a_killed_process_continues_and_ends_bit_identical(config: Finetune, tmp_path: Path) -> None:
    config = replace(config, epochs=8, checkpoint_minutes=0.0)
    whole = replace(config, out=str(tmp_path / "whole"))
    finetune(whole)
    words = ["finetune", config.start, "--data", config.data, "--out", config.out, "--epochs", "8",
             "--batch-size", "8", "--device", "cpu", "--workers", "0", "--log-every", "1", "--checkpoint-minutes", "0"]  # fmt: skip
    process = launch(words, tmp_path / "killed.txt")
    last = Run(Path(config.out)).last
    until(process, last.exists)
    process.kill()
    process.join()
    assert load(last)["step"] < 24
    finetune(config)
    states = [load(Run(Path(own.out)).last) for own in (config, whole)]
    for state in states:
        state.pop("config")
    assert equal(*states)


def test_damaged_best_weights_give_way_to_the_last(config: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finetune(config)
    (folder / "results.json").unlink()
    best = Run(folder).best
    best.write_bytes(best.read_bytes()[:-100])
    finetune(config)
    assert "The weights of the last step take its place" in capsys.readouterr().out
    states = [load(path)["model"] for path in (best, Run(folder).last)]
    assert equal(*states)
    assert (folder / "results.json").exists()


def test_a_finished_run_given_again_writes_its_results_again(config: Finetune) -> None:
    folder = finetune(config)
    before = (folder / "results.json").read_bytes()
    (folder / "results.json").unlink()
    finetune(config)
    assert (folder / "results.json").read_bytes() == before


def test_another_configuration_is_refused_and_nothing_is_lost(config: Finetune) -> None:
    folder = finetune(replace(config, epochs=1))
    with pytest.raises(UserError, match="layer_decay"):
        finetune(replace(config, epochs=1, layer_decay=0.3))
    with pytest.raises(UserError, match=r"1 added: train/red/more\.png"):
        Image.new("RGB", (32, 32), "red").save(Path(config.data) / "train" / "red" / "more.png")
        finetune(replace(config, epochs=1))
    assert load(Run(folder).last)["step"] == 3


def test_unreadable_files_are_skipped_and_listed(config: Finetune) -> None:
    for part in ("train/red/0.png", "val/blue/1.png"):
        (Path(config.data) / part).write_bytes(b"none")
    folder = finetune(replace(config, epochs=1))
    skipped = [json.loads(line)["path"] for line in Run(folder).skipped.read_text().splitlines()]
    assert sorted(Path(path).name for path in skipped) == ["0.png", "1.png"]
    assert sum(json.loads((folder / "results.json").read_text())["counts"]) == 11


def test_unbalanced_classes_are_weighed_and_a_class_of_one_image_trains(config: Finetune, capsys: Any) -> None:
    for i in range(1, 8):
        (Path(config.data) / "train" / "red" / f"{i}.png").unlink()
    folder = finetune(replace(config, epochs=1))
    assert "classes are weighed from" in capsys.readouterr().out
    assert json.loads((folder / "labels.json").read_text())["train_labels"].count(2) == 1


def test_in_half_precision(config: Finetune, capsys: Any) -> None:
    finetune(replace(config, epochs=1, precision="bf16"))
    assert "bf16 on cpu" in capsys.readouterr().out
    assert all(np.isfinite(line["loss"]) for line in lines(config) if "loss" in line)


def test_other_commands_say_what_a_fine_tuned_run_is(config: Finetune) -> None:
    folder = str(finetune(replace(config, epochs=1)))
    with pytest.raises(UserError, match="is a fine-tuned run; this takes one of `leanmim pretrain`"):
        show(Show(runs=(folder,)))
    ((_, accuracy),) = knn(Knn(run=folder, data=config.data, k=3, device="cpu", workers=0))
    assert 0 <= accuracy <= 1


def test_few_labels_fewer_than_a_batch(config: Finetune) -> None:
    folder = finetune(replace(config, labels_per_class=1, epochs=2))
    assert len(json.loads((folder / "labels.json").read_text())["train"]) == 3
    assert load(Run(folder).last)["step"] == 2


def test_from_scratch_there_is_no_layer_decay_and_a_rate_of_its_own(config: Finetune, tiny: Pretrain) -> None:
    own = replace(config, start="scratch", model=tiny.model, model_kwargs=tiny.model_kwargs, input_size=(32,), epochs=1)
    stored = json.loads((finetune(own) / "config.json").read_text())
    assert stored["layer_decay"] == 1.0
    assert stored["blr"] * 8 / 256 == pytest.approx(small_rate(8, True))


def test_that_a_larger_size_may_be_better_is_said(
    config: Finetune, tiny: Pretrain, tmp_path: Path, capsys: Any
) -> None:
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2}  # patches of 16 px
    small = untrained(replace(tiny, model_kwargs=shape, mask_ratio=0.5, out=str(tmp_path / "small")))
    finetune(replace(config, start=str(small), epochs=1))
    said = "of photos larger than 32 px, --input-size 224 shows more and may be more accurate"
    assert f"{said}, for some 49.0 times the cost" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="--input-size 40 is not divided by the model's patch of 16 px; try 32"):
        finetune(replace(config, start=str(small), input_size=(40,), out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_hours_limit_the_epochs(config: Finetune) -> None:
    stored = json.loads((finetune(replace(config, epochs="auto", hours=1e-6)) / "config.json").read_text())
    assert 0 < stored["epochs"] < 1
    assert stored["warmup_epochs"] is None or stored["warmup_epochs"] <= 1
    assert json.loads((Path(config.out) / "cost.json").read_text())["measured"]["images_per_second"] > 0


def test_the_last_epoch_may_be_a_part(config: Finetune, capsys: Any) -> None:
    finetune(replace(config, epochs=1.5, batch_size=12, effective_batch="auto"))
    said = capsys.readouterr().out
    assert "steps in 1.5 epochs" in said and "epoch 1.5  accuracy" in said


def test_what_is_missing_is_named(config: Finetune) -> None:
    with pytest.raises(UserError, match=r"no recipe 'smal' .* small"):
        finetune(replace(config, recipe="smal"))
    with pytest.raises(UserError, match="give --model"):
        finetune(replace(config, start="scratch"))
    with pytest.raises(UserError, match="architecture of its own"):
        finetune(replace(config, model="vit_tiny_patch16_224"))
    assert not Path(config.out).exists()


def test_it_goes_on_from_a_fine_tuned_run(config: Finetune, tiny: Pretrain, tmp_path: Path) -> None:
    """As a start with the same classes the head is kept; as weights for pre-training the encoder is taken."""
    tuned = str(finetune(replace(config, epochs=1)))
    again = replace(config, start=tuned, out=str(tmp_path / "again"), epochs=1, lr=0.0, min_lr=0.0)
    finetune(again)
    heads = [load(Run(Path(own)).best)["model"]["head.weight"] for own in (tuned, again.out)]
    assert torch.equal(*heads)
    pretrain(replace(tiny, init=tuned, out=str(tmp_path / "on"), epochs=1, blr=0.0))
    weights = [load(file)["model"] for file in (Run(Path(tuned)).best, Run(tmp_path / "on").last)]
    assert torch.equal(weights[0]["blocks.1.attn.qkv.weight"], weights[1]["encoder.backbone.blocks.1.attn.qkv.weight"])


def test_two_processes_are_one_with_twice_the_batch(config: Finetune, tmp_path: Path) -> None:
    config = replace(config, drop_path=0.0, lr=1e-3)
    one = replace(config, out=str(tmp_path / "one"))
    finetune(one)
    words = ["finetune", config.start, "--data", config.data, "--out", config.out, "--epochs", "3", "--batch-size", "4", "--device",
             "cpu", "--workers", "0", "--log-every", "1", "--drop-path", "0", "--lr", "1e-3"]  # fmt: skip
    done = together(tmp_path, words)
    assert done.codes == [0, 0], done.texts
    mine, theirs = (load(Run(Path(own.out)).last)["model"] for own in (one, config))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert "effective batch 8 = 4 x accum 1 x 2 processes" in done.texts[0]


def test_a_given_learning_rate_continues(config: Finetune) -> None:
    own = replace(config, lr=1e-3)
    stopped_after(own, 2)
    assert load(Run(finetune(own)).last)["step"] == 9


def test_another_start_or_the_starts_own_folder_is_refused(config: Finetune, tiny: Pretrain, tmp_path: Path) -> None:
    finetune(replace(config, epochs=1))
    other = str(untrained(replace(tiny, out=str(tmp_path / "other")), seed=6))
    with pytest.raises(UserError, match="other weights than those that this run began with"):
        finetune(replace(config, epochs=1, start=other))
    for start in (config.start, f"{config.start}/checkpoints/last.pt"):
        with pytest.raises(UserError, match="is where the start's weights are"):
            finetune(replace(config, start=start, out=config.start, overwrite=True))
    assert load(Run(Path(config.start)).last)["step"] == 0


def test_the_warm_up_of_a_recipe_is_a_share_of_the_epochs(config: Finetune) -> None:
    stored = json.loads((finetune(replace(config, epochs=2, recipe="mae")) / "config.json").read_text())
    assert (stored["warmup_share"], stored["warmup_epochs"]) == (0.05, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(crop_scale=(0.9, 0.2)), r"--crop-scale 0.9 0.2 must be 0 < low <= high <= 1"),
        (dict(betas=(0.9, 1.0)), r"--betas 0.9 1.0 must be"),
        (dict(epochs=2, warmup_epochs=3.0, warmup_share=0.0), r"--warmup-epochs 3.0 is not between 0 and the 2 epochs"),
        (dict(label_share=0.5, labels_per_class=2), "leave one out"),
        (dict(depth=9), "--depth 9"),
    ],
)
def test_impossible_numbers_are_refused(config: Finetune, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(replace(config, **changes))
