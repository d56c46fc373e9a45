"""Pre-training: what a step is, and what the run folder holds."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import leanmim
from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.data import IMAGENET, Crops, Folder, Normalise, collate, epoch_order, seed_of
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.run import Run, load
from leanmim.schedule import learning_rate
from leanmim.train import training as module
from leanmim.train.pretrain import pretrain
from leanmim.weights import restore
from tests.helpers import equal
from tests.runs import ENVIRONMENT, arguments, command, lines, weights


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
    data = Crops(Folder(config.data, 3), (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=5)
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


def test_too_many_readers_are_refused_before_anything_is_written(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["leanmim.data.batches"], "cpus", lambda: 2)
    with pytest.raises(UserError, match="--workers 1024 is too many"):
        pretrain(replace(tiny, workers=1024))
    assert not Path(tiny.out).exists()


@pytest.mark.results
def test_the_run_folder_holds_everything(tiny: Pretrain, capsys: pytest.CaptureFixture) -> None:
    folder = leanmim.pretrain(replace(tiny, epochs=3, show_every="auto"))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "config.json", "cost.json", "environment.json", "metrics.jsonl", "names.json", "tensorboard", "checkpoints", "export",
        "pictures", "reconstructions.png", "report.html",
    }  # fmt: skip
    assert Pretrain.from_json(json.loads((folder / "config.json").read_text())) == replace(
        tiny, epochs=3, show_every="auto"
    )
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


def test_checkpoints_hold_plain_values_only(tiny: Pretrain) -> None:
    pretrain(tiny)
    state = torch.load(Run(Path(tiny.out)).last, weights_only=True)
    assert set(state) == {
        "format", "config", "phase", "step", "losses", "bad_steps", "mean", "std", "ease", "model", "optimizers",
    }  # fmt: skip


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


def test_a_run_folder_that_cannot_be_made(tiny: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out '.*file/run' cannot be made .*choose another folder"):
        pretrain(replace(tiny, out=str(tmp_path / "file" / "run")))


def test_online_knn_is_logged_and_takes_no_time_of_training(
    tiny: Pretrain, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which a step takes 1e4 s and a kNN 1e6 s, beside which real time is nothing."""
    clock, passed = time.perf_counter, [0.0]

    def slowly(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            passed[0] += seconds
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr("leanmim.train.training.update", slowly(module.update, 1e4))
    monkeypatch.setattr("leanmim.train.training.knn_accuracy", slowly(module.knn_accuracy, 1e6))
    for part in ("train", "val"):
        for name in ("cat", "sheep", "macaw"):
            (tmp_path / "labelled" / part / name).mkdir(parents=True)
            (tmp_path / "labelled" / part / name / "1.jpg").symlink_to(photos / f"{name}.jpg")
    pretrain(replace(tiny, knn_data=str(tmp_path / "labelled"), knn_every=1, log_every=3))
    seconds = [line["seconds"] for line in lines(tiny) if "seconds" in line]
    assert [round(value / 1e4) for value in seconds] == [3, 3, 2]  # steps 1-3, 4-6, 7-8; kNN after 4 and 8
    said = capsys.readouterr().out
    assert "step 4/8  epoch 1  kNN 100.0 % (95 % interval 43.9 to 100.0, 3 images)" in said
    assert "step 8/8  epoch 2  kNN 100.0 % (95 % interval 43.9 to 100.0, 3 images)" in said
    accuracies = [(line["step"], line["knn"]) for line in lines(tiny) if "knn" in line]
    assert accuracies == [(4, 1.0), (8, 1.0)]  # each image finds itself
    assert all(line["knn_images"] == 3 and line["knn_low"] < 0.44 for line in lines(tiny) if "knn" in line)


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1.5, 6), (1.6, 6)])
def test_the_last_epoch_may_be_a_part(
    tiny: Pretrain, photos: Path, epochs: float, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The schedule ends with it, and so does the run; accuracy is measured there too."""
    for part in ("train", "val"):
        for name in ("cat", "sheep"):
            (tmp_path / "labelled" / part / name).mkdir(parents=True)
            (tmp_path / "labelled" / part / name / "1.jpg").symlink_to(photos / f"{name}.jpg")
    pretrain(replace(tiny, epochs=epochs, knn_data=str(tmp_path / "labelled"), knn_every=1))
    assert f"{steps} steps in {epochs} epochs" in capsys.readouterr().out
    trained = [line for line in lines(tiny) if "lr" in line]
    assert (trained[-1]["step"], trained[-1]["epoch"]) == (steps, steps / 4)
    peak = float(restore(tiny.out)[0].blr) * 4 / 256
    assert trained[-1]["lr"] == pytest.approx(learning_rate((steps - 1) / 4, epochs, 0.05 * epochs, peak))
    assert [line["step"] for line in lines(tiny) if "knn" in line][-1] == steps


TRACED = """
import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # traced and differentiated ahead; no C++ to compile
from leanmim.cli import main
main(sys.argv[1:])
print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_compiled_training_is_the_same_training(tiny: Pretrain, tmp_path: Path) -> None:
    """Also in a second phase, of another size: shapes stay static, and every segment of every phase is compiled."""
    config = replace(tiny, epochs=1, blr=0.1, segments=2, mask_ratio=(0.5, 0.7), throw=0.25)
    config = replace(config, phase_scales=(0.75, 1.0), phase_starts=(0.0, 0.5))
    pretrain(config)
    compiled = replace(config, out=str(tmp_path / "compiled"), compile=True)
    done = subprocess.run(
        [sys.executable, "-c", TRACED, *command(compiled)[3:]], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
    assert int(done.stdout.rpartition("graphs:")[2]) >= 8  # of two segments and their decoders, in two phases
    assert "lru_cache" not in done.stderr  # the decoder's positions are a constant, not computed in every step
    assert weights(compiled).keys() == weights(config).keys()
    for a, b in zip(lines(config), lines(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_deterministic_algorithms_change_nothing_on_a_cpu(tiny: Pretrain, tmp_path: Path) -> None:
    other = replace(tiny, out=str(tmp_path / "deterministic"), deterministic=True)
    for config in (tiny, other):
        pretrain(replace(config, epochs=1, target="hog", hog_cell=4, throw=0.25))
    assert not torch.are_deterministic_algorithms_enabled()
    assert equal(dict(weights(tiny)), dict(weights(other)))


def test_bf16_trains(tiny: Pretrain) -> None:
    pretrain(replace(tiny, precision="bf16"))
    assert all(value.dtype != torch.bfloat16 for value in weights(tiny).values())


FEATURES: dict[str, dict[str, Any]] = {
    "as a run chooses": dict.fromkeys(("precision", "compile", "channels_last", "cuda_graph"), "auto"),
    "checkpointing": {"checkpointing": True},
    "update in backward": {"update_in_backward": True},
    "offload": {"offload": True},
    "8 bits": {"optimizer": "adamw8bit"},
    "compiled": {"compile": True},
    "deterministic": {"deterministic": True},
    "channels last": {"channels_last": True},
}
NARROW = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
ALONE = (
    "8 bits",
    "compiled",
    "deterministic",
)  # a process each: tests check types, which is not compiled; not after others used the GPU
GPU = "cuda"  # with "cpu", and without the mark that skips them, the same tests pass, some of whose features then do nothing
COMPILING = find_spec("triton") and (which("cc") or which("gcc") or which("clang"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # what torch says of a card is no failure
@pytest.mark.parametrize("feature", FEATURES)
def test_it_trains_on_a_gpu(feature: str, tiny: Pretrain, tiny_simmim: Pretrain, tmp_path: Path) -> None:
    """With each of what a run can ask for, as it does in fp32 without; matrix products of TF32 and sums by atomics are not the same bits."""
    if feature == "8 bits":
        pytest.importorskip("torchao")
    if feature in ("8 bits", "compiled") and GPU == "cuda" and not COMPILING:
        pytest.skip("needs Triton and a C compiler")
    if feature == "channels last":
        tiny = replace(tiny_simmim, model="convnext_atto", model_kwargs=NARROW, masking="pixel", mask_unit=32)
    plain = replace(
        tiny, device=GPU, precision="fp32", compile=False, channels_last=False, cuda_graph=False, epochs=20, blr=0.05,
        workers=2,
    )  # fmt: skip
    other = replace(plain, out=str(tmp_path / "other"), **FEATURES[feature])
    pretrain(plain)
    if feature in ALONE:
        done = subprocess.run(command(other), env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        pretrain(other)
    expected, losses = ([line["loss"] for line in lines(config)] for config in (plain, other))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert feature == "channels last" or sum(losses[-8:]) < sum(losses[:8])  # so narrow it learns little in 80 steps


@pytest.mark.results
def test_a_source_of_a_third_party_trains(tiny: Pretrain, tmp_path: Path) -> None:
    """Stripes that no file holds; --data names it, from the command line too."""

    class Stripes:
        names = tuple("01234567")

        def __len__(self) -> int:
            return 8

        def where(self, index: int) -> str:
            return f"stripes {index}"

        def read(self, index: int) -> Image.Image:
            return Image.fromarray(np.tile(np.uint8([0, 30 * index]), (40, 20))).convert("RGB")

    def opener(data: str, channels: int) -> Stripes | None:
        return Stripes() if data == "stripes:8" else None

    leanmim.SOURCES.append(opener)
    try:
        main(arguments(replace(tiny, data="stripes:8", epochs=3)))
    finally:
        leanmim.SOURCES.remove(opener)
    assert [line["step"] for line in lines(tiny)] == [1, 2, 3, 4, 5, 6]
    assert json.loads(Run(Path(tiny.out)).names.read_text())["names"] == list("01234567")
    assert (Path(tiny.out) / "reconstructions.png").is_file()
