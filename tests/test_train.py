"""The loop: what a step is, resuming, several processes, the run folder."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import leanmim
from leanmim.checkpoint import Run, load, restore
from leanmim.config import Pretrain
from leanmim.data import IMAGENET, Crops, Normalise, collate, epoch_order, list_images, seed_of
from leanmim.errors import UserError
from leanmim.mim import build
from leanmim.schedule import learning_rate
from leanmim.step import parameter_groups
from leanmim.train import pretrain


def options(config: Pretrain) -> list[str]:
    """A configuration as the command line has it."""
    words = ["pretrain", config.recipe]
    for name, value in asdict(config).items():
        if name == "recipe" or value is None:
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [option if value else "--no-" + option[2:]]
        elif isinstance(value, dict):
            words += [option, *(str(part) for pair in value.items() for part in pair)] if value else []
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def command(config: Pretrain) -> list[str]:
    return [sys.executable, "-m", "leanmim", *options(config)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def weights(config: Pretrain) -> dict[str, torch.Tensor]:
    return load(Run(Path(config.out)).last)["model"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lines(config: Pretrain) -> list[dict]:
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def test_the_loop_is_this_loop(tiny: Pretrain) -> None:
    """Written out by hand: order, crops, masks, learning rate, accumulation, weight decay. Bit for bit."""
    config = replace(tiny, accum=2, blr=0.01, seed=5, epochs=2)
    pretrain(config)

    torch.manual_seed(5)
    model = build(config).train()
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and "token" not in n]
    plain = [p for n, p in model.named_parameters() if p.requires_grad and not (p.ndim > 1 and "token" not in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": plain, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    data = Crops(list_images(config.data), 3, (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=5)
    normalise = Normalise(*IMAGENET[3], torch.device("cpu"))
    for step in range(4):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(step, 4, 0.2, 0.01 * 8 / 256)
        optimizer.zero_grad()
        for micro in range(2):
            epoch, batch = divmod(2 * step + micro, 4)
            indices = epoch_order(16, 5, epoch)[4 * batch : 4 * batch + 4].tolist()
            images, _ = collate([data[epoch, index] for index in indices])
            torch.manual_seed(seed_of(5, 0, step, micro))
            (loss,) = model.losses(normalise(images))
            (loss / 2).backward()
        optimizer.step()
    assert equal(weights(config), model.state_dict())


def test_the_run_folder_holds_everything(tiny: Pretrain, capsys: pytest.CaptureFixture) -> None:
    folder = leanmim.pretrain(replace(tiny, epochs=3))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "cost.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "export",
        "reconstructions.png", "report.html",
    }  # fmt: skip
    assert Pretrain.from_json(json.loads((folder / "config.json").read_text())) == replace(tiny, epochs=3)
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    assert list((folder / "tensorboard").glob("events*"))
    written = lines(tiny)
    assert [line["step"] for line in written] == list(range(1, 13))
    assert written[3]["epoch"] == 1.0
    for line in written:
        assert 0 < line["loss"] < 10 and line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1 and line["memory_bytes"] > 1e6
    peak = 1.5e-4 * 4 / 256
    assert [line["lr"] for line in written] == [learning_rate(step, 12, 0.6, peak) for step in range(12)]
    said = capsys.readouterr().out
    assert "effective batch 4 = 4 x accum 1 x 1 processes; lr 2.34e-06 = blr 0.00015 x 4 / 256" in said


def test_training_lowers_the_loss(tiny: Pretrain) -> None:
    pretrain(replace(tiny, epochs=15, blr=0.1, crop_scale=(0.9, 1.0)))
    losses = [line["loss"] for line in lines(tiny)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_continued_is_bit_identical(tiny: Pretrain, tmp_path: Path, workers: int) -> None:
    """SIGKILL at arbitrary moments, three times; weights, optimizer state and metrics as if nothing had happened."""
    config = replace(tiny, epochs=12, accum=2, checkpoint_minutes=0.0, workers=workers, blr=0.01)
    whole = replace(config, out=str(tmp_path / "whole"))
    subprocess.run(command(whole), check=True, env=ENVIRONMENT, capture_output=True)

    run = Run(Path(config.out))
    for kill_after in (2, 9, 15):  # steps, of 24
        process = subprocess.Popen(command(config), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            done = run.metrics.read_text().count("\n") if run.metrics.exists() else 0
            if done >= kill_after:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (run.folder / "checkpoints" / "last.pt.part").write_bytes(
            b"half a checkpoint"
        )  # as a kill while writing leaves it
    last = subprocess.run(command(config), check=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert "continuing after step" in last.stdout

    one, two = load(run.last), load(Run(Path(whole.out)).last)
    assert one["step"] == two["step"] == 24
    assert equal(one["model"], two["model"])
    for key, value in one["optimizers"][0]["state"].items():
        assert equal(value, two["optimizers"][0]["state"][key])
    assert [(line["step"], line["loss"], line["lr"]) for line in lines(config)] == [
        (line["step"], line["loss"], line["lr"]) for line in lines(whole)
    ]


def test_a_finished_run_is_left_as_it_is(tiny: Pretrain) -> None:
    pretrain(tiny)
    before, written = weights(tiny), lines(tiny)
    pretrain(replace(tiny, workers=1))  # what changes no weight may differ
    assert equal(weights(tiny), before)
    assert lines(tiny) == written


def test_another_configuration_is_refused_with_the_difference(tiny: Pretrain) -> None:
    pretrain(tiny)
    before = {path: path.read_bytes() for path in Path(tiny.out).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"mask_ratio: 0\.75 there, 0\.5 now\n.*seed: 0 there, 1 now\n.*--overwrite"):
        pretrain(replace(tiny, mask_ratio=0.5, seed=1))
    assert {path: path.read_bytes() for path in Path(tiny.out).rglob("*") if path.is_file()} == before
    pretrain(replace(tiny, seed=1, overwrite=True))
    assert load(Run(Path(tiny.out)).last)["config"]["seed"] == 1


def test_a_folder_of_something_else_is_not_touched(tiny: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a run of leanmim"):
            pretrain(replace(tiny, overwrite=overwrite))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_said_so_and_kept(tiny: Pretrain) -> None:
    pretrain(tiny)
    last = Run(Path(tiny.out)).last
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt' is damaged.*--overwrite"):
        pretrain(tiny)
    assert len(last.read_bytes()) == 1000
    torch.save({"epoch": 3}, last)
    with pytest.raises(UserError, match="not one of leanmim"):
        pretrain(tiny)


def test_checkpoints_hold_plain_values_only(tiny: Pretrain) -> None:
    pretrain(tiny)
    state = torch.load(Run(Path(tiny.out)).last, weights_only=True)
    assert set(state) == {"format", "config", "stage", "step", "mean", "std", "model", "optimizers"}


def test_statistics_given_and_computed(tiny: Pretrain, tmp_path: Path) -> None:
    pretrain(replace(tiny, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 0.5)))
    state = load(Run(Path(tiny.out)).last)
    assert (state["mean"], state["std"]) == ([0.1, 0.2, 0.3], [1.0, 1.0, 0.5])
    computed = replace(tiny, out=str(tmp_path / "computed"), statistics="data", channels=1)
    pretrain(computed)
    state = load(Run(Path(computed.out)).last)
    assert 0.3 < state["mean"][0] < 0.6 and 0.1 < state["std"][0] < 0.4
    _, model, _ = restore(computed.out)
    assert model.encoder.backbone.patch_embed.proj.weight.shape[1] == 1


def test_divergence_ends_the_run_and_keeps_the_checkpoint(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = leanmim.MIM.losses
    calls = []

    def losses(self: leanmim.MIM, images: torch.Tensor, mask: object = None) -> object:
        calls.append(1)
        for loss in broken(self, images, mask):
            yield loss * (math.nan if len(calls) > 6 else 1)  # the first call counts the cost

    monkeypatch.setattr(leanmim.MIM, "forward", losses)
    with pytest.raises(UserError, match=r"diverged; lower --blr"):
        pretrain(replace(tiny, checkpoint_minutes=0.0))
    assert load(Run(Path(tiny.out)).last)["step"] == 5


def test_a_run_folder_that_cannot_be_made(tiny: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out '.*file/run' cannot be made .*choose another folder"):
        pretrain(replace(tiny, out=str(tmp_path / "file" / "run")))


def test_starting_afresh_leaves_no_picture_of_the_earlier_run(tiny: Pretrain, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    for name in ("reconstructions.png", "reconstructions-block0.png", "mine.png"):
        (run.folder / name).touch()
    run.prepare(tiny, 0)
    assert [path.name for path in run.folder.glob("*.png")] == ["mine.png"]


def test_online_knn_is_logged_and_takes_no_time_of_training(
    tiny: Pretrain, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which a step takes 1e4 s and a kNN 1e6 s, beside which real time is nothing."""
    clock, passed = time.perf_counter, [0.0]

    def slowly(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            passed[0] += seconds
            return function(*arguments)

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr("leanmim.train.update", slowly(leanmim.train.update, 1e4))
    monkeypatch.setattr("leanmim.train.knn_accuracy", slowly(leanmim.train.knn_accuracy, 1e6))
    for part in ("train", "val"):
        for name in ("cat", "sheep", "macaw"):
            (tmp_path / "labelled" / part / name).mkdir(parents=True)
            (tmp_path / "labelled" / part / name / "1.jpg").symlink_to(photos / f"{name}.jpg")
    pretrain(replace(tiny, knn_data=str(tmp_path / "labelled"), knn_every=1, log_every=3))
    seconds = [line["seconds"] for line in lines(tiny) if "seconds" in line]
    assert [round(value / 1e4) for value in seconds] == [3, 3, 2]  # steps 1-3, 4-6, 7-8; kNN after 4 and 8
    said = capsys.readouterr().out
    assert "step 4/8  epoch 1  kNN 100.0%" in said and "step 8/8  epoch 2  kNN 100.0%" in said
    accuracies = [(line["step"], line["knn"]) for line in lines(tiny) if "knn" in line]
    assert accuracies == [(4, 1.0), (8, 1.0)]  # each image finds itself


def test_weight_decay_spares_biases_norms_tokens_and_tables(tiny: Pretrain) -> None:
    swin = replace(
        leanmim.SIMMIM,
        model="swin_tiny_patch4_window7_224",
        model_kwargs={"embed_dim": 24},
        input_size=(64,),
        data="-",
        out="-",
    )
    for config in (replace(tiny, model_kwargs={**tiny.model_kwargs, "reg_tokens": 2}), swin):
        model = build(config)
        names = {id(p): name for name, p in model.named_parameters()}
        ((decayed, plain),) = parameter_groups(model)
        spared = {names[id(p)] for p in plain["params"]}
        assert plain["weight_decay"] == 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                special = parameter.ndim == 1 or name.split(".")[-1] in (
                    "cls_token", "reg_token", "mask_token", "pos_embed", "relative_position_bias_table",
                )  # fmt: skip
                assert (name in spared) == special, name
        assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("accum", [1, 2])
def test_two_processes_average_their_gradients(tiny: Pretrain, accum: int) -> None:
    """Two gloo processes of batch 4 take the step that averages both processes' gradients."""
    config = replace(tiny, epochs=1, accum=accum, blr=0.1, warmup_epochs=0.0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "leanmim", *options(config)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"effective batch {8 * accum} = 4 x accum {accum} x 2 processes" in done.stdout

    torch.manual_seed(0)
    model = build(config).train()
    groups = parameter_groups(model)[0]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    data = Crops(list_images(config.data), 3, (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=0)
    normalise = Normalise(*IMAGENET[3], torch.device("cpu"))
    order, steps = epoch_order(16, 0, 0), 2 // accum
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 0.0, 0.1 * 8 * accum / 256)
        optimizer.zero_grad()
        for micro in range(accum):
            for rank in range(2):
                first = ((accum * step + micro) * 2 + rank) * 4
                images, _ = collate([data[0, index] for index in order[first : first + 4].tolist()])
                torch.manual_seed(seed_of(0, rank, step, micro))
                (loss,) = model.losses(normalise(images))
                (loss / accum / 2).backward()
        optimizer.step()
    for name, value in weights(config).items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=2e-6), name

    # one process goes on with it: evaluates, exports, starts from it
    backbone, _, _ = leanmim.load_backbone(config.out)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    assert (
        "continuing after step"
        in subprocess.run(command(replace(config)), env=ENVIRONMENT, capture_output=True, text=True).stdout
    )


def test_compiled_training_is_the_same_training(tiny: Pretrain, tmp_path: Path) -> None:
    config = replace(tiny, epochs=1, blr=0.1, segments=2, mask_ratio=(0.5, 0.7), throw=0.25)
    pretrain(config)
    compiled = replace(config, out=str(tmp_path / "compiled"), compile=True)
    done = subprocess.run(command(compiled), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lru_cache" not in done.stderr  # the decoder's positions are a constant, not computed in every step
    assert weights(compiled).keys() == weights(config).keys()
    for a, b in zip(lines(config), lines(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_bf16_trains(tiny: Pretrain) -> None:
    pretrain(replace(tiny, precision="bf16"))
    assert all(value.dtype != torch.bfloat16 for value in weights(tiny).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_on_a_gpu(tiny: Pretrain) -> None:
    pretrain(replace(tiny, device="cuda", epochs=20, blr=0.05, workers=2))
    losses = [line["loss"] for line in lines(tiny)]
    assert sum(losses[-8:]) < sum(losses[:8])
