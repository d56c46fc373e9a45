"""What is measured before a run: which settings are tried, when a change is taken, and that it is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import leanmim.device
from leanmim import calibration, planner
from leanmim.calibration import Setting, Trial, calibrate
from leanmim.classifier import right_size as classifier_right_size
from leanmim.classifier.finetune import finetune
from leanmim.config import Finetune, Pretrain
from leanmim.device import bf16_in_hardware, cpus
from leanmim.errors import UserError
from leanmim.processes import ALONE
from leanmim.run import Run
from leanmim.step import align_state
from leanmim.train.pretrain import pretrain
from tests.helpers import PHOTOS
from tests.runs import lines, weights

CPU = torch.device("cpu")


class Clock(Trial):
    """A machine whose steps take a known time: seconds of an image for a setting."""

    def __init__(self, cost: Any, model: nn.Module, read: float = 0.0) -> None:
        super().__init__(model, [], CPU, 16)
        self.cost, self.now, self.read, self.steps = cost, 0.0, read, 0

    def use(self, setting: Setting) -> None:
        super().use(setting)
        self.setting = replace(setting, compile=self.compiled)

    def autocast(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def compile(self) -> None:
        self.now += 60

    def step(self, images: int) -> None:
        self.now += images * self.cost(self.setting)
        self.steps += 1

    def read_one(self) -> None:
        self.now += self.read


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calibrates on such a machine of four cores, which has bfloat16."""
    monkeypatch.setattr(calibration, "threads_given", lambda: False)
    monkeypatch.setattr(calibration, "bf16_in_hardware", lambda device: True)
    monkeypatch.setattr(calibration, "FAILS_WELL", True)
    for module in (calibration, leanmim.device):
        monkeypatch.setattr(module, "cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(calibration.psutil, "cpu_count", lambda logical: 2)

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(calibration, "device_name", lambda device: device.type)

    def run(
        clock: Clock, stored: Any = None, device: torch.device = CPU, seconds: float = 1e9, **given: Any
    ) -> calibration.Calibration:
        monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        config = Pretrain(data="d", out="o", **given)
        return calibrate(
            config, stored, clock.model, lambda: clock, clock.read_one, lambda speed: seconds, ALONE, device
        )

    return run


LINEAR, CONVOLUTION = nn.Linear(2, 2), nn.Conv2d(2, 2, 3)


def test_what_is_faster_is_taken(measured: Any) -> None:
    def cost(own: Setting) -> float:
        return (
            (0.1 if own.threads == 2 else 0.2)
            * (0.5 if own.precision == "bf16" else 1)
            * (0.8 if own.channels_last else 1)
        )

    found = measured(Clock(cost, CONVOLUTION, read=0.05))
    # 0.04 s an image, of which reading takes a reader 1.25 times: 1.6 readers
    assert found.setting == Setting("bf16", 2, 2, True, False)
    assert [one["choice"] for one in found.tried] == ["threads", "precision", "channels_last"]
    assert found.tried[0]["images_per_second"] == pytest.approx({"4": 5, "2": 10})
    assert "measured, images/s: threads 4 5, 2 10; precision fp32 10, bf16 20" in str(found)


def test_what_is_hardly_faster_is_not(measured: Any) -> None:
    def cost(own: Setting) -> float:
        return 0.1 * (0.98 if own.threads == 2 else 1) * (0.93 if own.precision == "bf16" else 1)

    assert measured(Clock(cost, LINEAR)).setting == Setting("fp32", 4, 0, False, False)


def test_channels_last_is_for_convolutions_that_overlap(measured: Any) -> None:
    patches = nn.Conv2d(3, 4, 16, stride=16)
    for model, tried in ((LINEAR, False), (patches, False), (CONVOLUTION, True)):
        found = measured(Clock(lambda own: 0.1, model))
        assert ("channels_last" in [one["choice"] for one in found.tried]) is tried


def test_what_is_given_stays_and_is_not_tried(measured: Any) -> None:
    given = dict(threads=3, precision="fp32", channels_last=True, compile=False)
    clock = Clock(lambda own: 0.1, CONVOLUTION, read=1.0)
    found = measured(clock, **given)
    assert found.setting == Setting("fp32", 3, 3, True, False) and not found.tried  # a core is left for the steps
    steps = clock.steps
    assert measured(clock, workers=0, **given).setting.workers == 0
    assert clock.steps == steps  # nothing to measure
    plain = Clock(lambda own: 0.1, LINEAR)  # without convolutions there is no choice of memory format
    assert measured(plain, threads=3, precision="fp32", workers=0).setting.threads == 3 and plain.steps == 0


def test_deterministic_runs_measure_the_readers_alone(measured: Any) -> None:
    found = measured(Clock(lambda own: 0.1 if own.threads == 2 else 0.2, CONVOLUTION, read=0.05), deterministic=True)
    assert found.setting == Setting("fp32", 4, 1, False, False) and not found.tried


def test_the_environment_gives_the_threads(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "threads_given", lambda: True)
    found = measured(Clock(lambda own: 0.1 if own.threads == 2 else 0.2, LINEAR))
    assert found.setting.threads == 4


def test_a_large_step_is_measured_on_few_images(measured: Any) -> None:
    slow = Clock(lambda own: 1.0, LINEAR)
    measured(slow)
    assert slow.now / slow.steps == 2  # s: two images
    fast = Clock(lambda own: 1e-3, LINEAR)
    measured(fast)
    assert fast.now < 0.016 * fast.steps


def test_an_earlier_calibration_is_used_again(measured: Any) -> None:
    found = measured(Clock(lambda own: 0.1 if own.threads == 2 else 0.2, CONVOLUTION))
    stored = json.loads(json.dumps(found.to_json()))
    other = Clock(lambda own: 0.2 if own.threads == 2 else 0.1, CONVOLUTION)
    assert measured(other, stored).setting == found.setting and other.steps == 0
    assert measured(other, stored, threads=1).setting == replace(found.setting, threads=1)
    # on another machine the precision stays, of which the weights know
    elsewhere = stored | {"machine": stored["machine"] | {"cpus": 64}}
    again = measured(Clock(lambda own: 0.1 if own.precision == "bf16" else 0.2, CONVOLUTION), elsewhere)
    assert again.setting.precision == "fp32" and "precision" not in [one["choice"] for one in again.tried]
    for damaged in (None, [], {"setting": {"threads": 1}}, {"setting": None, "machine": {}}):
        assert measured(Clock(lambda own: 0.1, LINEAR), damaged).tried


def test_half_precision_is_not_kept_where_software_computes_it(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(Clock(lambda own: 0.1 if own.precision == "bf16" else 0.2, LINEAR))
    stored = json.loads(json.dumps(found.to_json()))
    stored["machine"]["device"] = "another"
    assert found.setting.precision == "bf16" == measured(Clock(lambda own: 0.1, LINEAR), stored).setting.precision
    monkeypatch.setattr(calibration, "bf16_in_hardware", lambda device: False)
    assert measured(Clock(lambda own: 0.1, LINEAR), stored).setting.precision == "fp32"


def test_damaged_choices_are_measured_again(measured: Any) -> None:
    stored = json.loads(json.dumps(measured(Clock(lambda own: 0.1, LINEAR)).to_json()))
    for name, value in (("threads", "many"), ("threads", 0), ("precision", "fp7"), ("compile", None)):
        clock = Clock(lambda own: 0.1, LINEAR)
        assert measured(clock, stored | {"setting": stored["setting"] | {name: value}}).tried and clock.steps


def test_long_runs_on_a_gpu_are_compiled_where_that_is_faster(
    measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def faster(own: Setting) -> float:
        return 0.05 if own.compile else 0.1

    cuda = torch.device("cuda")
    found = measured(Clock(faster, LINEAR), device=cuda)
    assert found.setting.compile and found.tried[0]["images_per_second"] == pytest.approx({"False": 10, "True": 20})
    assert not measured(Clock(lambda own: 0.1, LINEAR), device=cuda).setting.compile
    assert not measured(Clock(faster, LINEAR), device=cuda, seconds=60).setting.compile  # over before it pays
    assert not measured(Clock(faster, LINEAR)).setting.compile

    class Broken(Clock):
        def compile(self) -> None:
            raise RuntimeError("no compiler\nand more")

    assert not measured(Broken(faster, LINEAR), device=cuda).setting.compile
    assert "not compiled, which failed: no compiler\n" in capsys.readouterr().err


def test_a_step_on_a_gpu_is_recorded_where_that_is_faster(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def faster(own: Setting) -> float:
        return 0.05 if own.cuda_graph else 0.1

    cuda = torch.device("cuda")
    found = measured(Clock(faster, LINEAR), device=cuda, seconds=60)
    assert found.setting.cuda_graph and "computing: bf16" in str(found) and "as a CUDA graph" in str(found)
    assert found.tried == [{"choice": "cuda_graph", "chosen": True, "images_per_second": {"False": 10.0, "True": 20.0}}]
    again = measured(Clock(faster, LINEAR), json.loads(json.dumps(found.to_json())), device=cuda)
    assert again.setting.cuda_graph and not again.tried
    again = measured(Clock(faster, LINEAR), found.to_json(), device=cuda, checkpointing=True)
    assert not again.setting.cuda_graph
    assert not measured(Clock(lambda own: 0.1, LINEAR), device=cuda).setting.cuda_graph
    assert not measured(Clock(faster, LINEAR), device=cuda, checkpointing=True).setting.cuda_graph  # cannot be
    assert not measured(Clock(faster, LINEAR), device=cuda, cuda_graph=False).setting.cuda_graph
    assert not measured(Clock(faster, LINEAR)).setting.cuda_graph

    def broken(own: Setting) -> float:
        if own.cuda_graph:
            raise RuntimeError("CUDA error: operation not permitted\nand more")
        return 0.1

    assert not measured(Clock(broken, LINEAR), device=cuda).setting.cuda_graph
    assert "no CUDA graph, which failed: CUDA error: operation not permitted\n" in capsys.readouterr().err


def test_the_threads_of_the_caller_come_back(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "threads_given", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pretrain(replace(tiny, epochs=1, workers=-1))  # measures with one thread, too; of only a few images
        assert torch.get_num_threads() == 2
        with (
            pytest.raises(UserError, match="never here"),
            calibration.Calibration(Setting("fp32", 1, 0, False, False), {}, []).in_use(),
        ):
            raise UserError("never here")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_few_images_are_enough(tiny: Pretrain, tmp_path: Path) -> None:
    for photo in sorted(PHOTOS.rglob("*.jpg"))[:4]:
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / photo.name).symlink_to(photo.resolve())
    pretrain(replace(tiny, data=str(tmp_path / "few"), epochs=1, workers=-1))
    assert lines(tiny)[-1]["step"] == 1


def test_a_run_keeps_what_it_measured(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "threads_given", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    config = replace(tiny, workers=-1, epochs=2)
    pretrain(config)
    stored = json.loads(Run(Path(tiny.out)).environment.read_text())["calibration"]
    assert [one["choice"] for one in stored["tried"]] == ["threads"] and stored["read_seconds"] > 0
    assert json.loads(Run(Path(tiny.out)).config.read_text())["threads"] == "auto"
    assert used[-2:] == [stored["setting"]["threads"], 2]  # of the run, and those before it
    monkeypatch.setattr(planner, "PretrainTrial", None)  # nothing is measured again
    pretrain(replace(config, epochs=3))
    again = json.loads(Run(Path(tiny.out)).environment.read_text())["calibration"]
    assert again["setting"] == stored["setting"] and again["tried"] == []
    assert lines(tiny)[-1]["step"] == 12


def test_both_trials_step_under_every_setting(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = planner.PretrainTrial(replace(tiny, blr=0.0), CPU)
    assert trial.most == 4  # the batch
    plain = Setting("fp32", 1, 0, False, False)
    for setting in (plain, replace(plain, precision="bf16"), replace(plain, channels_last=True), plain):
        trial.use(setting)
        trial.step(2)
    pretrain(replace(tiny, epochs=1))
    made: list[Any] = []

    class Watched(classifier_right_size.TuningTrial):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(classifier_right_size, "TuningTrial", Watched)
    monkeypatch.setattr(calibration, "threads_given", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    labelled = tmp_path / "labelled"
    for name, photos in (("a", sorted(PHOTOS.rglob("*.jpg"))[:4]), ("b", sorted(PHOTOS.rglob("*.jpg"))[4:8])):
        (labelled / name).mkdir(parents=True)
        for photo in photos:
            (labelled / name / photo.name).symlink_to(photo.resolve())
    config = Finetune(
        start=tiny.out, data=str(labelled), out=str(tmp_path / "tuned"), epochs=1, batch_size=4, device="cpu"
    )
    finetune(config)
    found = json.loads((tmp_path / "tuned" / "environment.json").read_text())["calibration"]
    assert len(made) == 1 and [one["choice"] for one in found["tried"]] == ["threads"]
    for setting in (plain, replace(plain, precision="bf16"), replace(plain, channels_last=True), plain):
        made[0].use(setting)
        made[0].step(2)


def test_channels_last_trains_alike_and_is_continued(tiny: Pretrain, tmp_path: Path) -> None:
    shape = dict(masking="pixel", model="resnet10t", model_kwargs={}, input_size=(64,), target="hog", decoder_depth=1)
    own = replace(tiny, **shape, epochs=2, channels_last=False)
    last = replace(own, out=str(tmp_path / "last"), channels_last=True)
    pretrain(own)
    pretrain(replace(last, epochs=1, schedule="constant", warmup_epochs=0))
    pretrain(replace(last, epochs=2, schedule="constant", warmup_epochs=0))  # continued
    whole = replace(last, out=str(tmp_path / "whole"), schedule="constant", warmup_epochs=0)
    for a, b in zip(lines(own)[:1], lines(last)[:1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    pretrain(whole)
    assert weights(whole)["encoder.backbone.layer1.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_moments_lie_as_the_parameters_do() -> None:
    layer = nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    before = optimizer.state[layer.weight]["exp_avg"].clone()
    layer.to(memory_format=torch.channels_last)
    align_state([optimizer])
    moment = optimizer.state[layer.weight]["exp_avg"]
    assert moment.stride() == layer.weight.stride() and torch.equal(moment, before)


def test_cores_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    for text, count in (("max 100000\n", 8), ("250000 100000\n", 3), ("50000 100000\n", 1), ("9900000 100000\n", 8)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert cpus() == count


def test_emulated_half_precision_is_none() -> None:
    """tests/conftest.py limits the instructions to those of a CPU without bfloat16."""
    assert not bf16_in_hardware(CPU)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    yield {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}


def test_threads_do_not_spin_unless_asked(environment: dict[str, str]) -> None:
    code = "import os, sys, leanmim; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, want in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        done = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True)
        assert done.stdout.strip() == want
