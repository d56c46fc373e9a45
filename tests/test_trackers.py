"""Trackers get what metrics.jsonl has, under its names. They are stand-ins that keep what they are told."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from leanmim import trackers
from leanmim.cli import main
from leanmim.config import Pretrain, Probe
from leanmim.errors import UserError
from leanmim.loop import Loop
from leanmim.processes import ALONE
from leanmim.recipes import MAE
from leanmim.run import Run
from leanmim.train.pretrain import pretrain
from tests.runs import Refused, lines

NAMES = ("wandb", "mlflow")


@dataclass
class Kept:
    """A run in a tracker."""

    config: dict[str, Any] = field(default_factory=dict)
    log: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Step and values, as they came."""
    pictures: list[tuple[int, str, bytes]] = field(default_factory=list)
    """Step, name and PNG file."""
    closed: list[bool] = field(default_factory=list)
    """Of each call whether the run was done."""
    opened: int = 0


class Service:
    """What stands behind a tracker's library."""

    def __init__(self) -> None:
        self.runs: dict[str, Kept] = {}
        self.away = False
        """Whether it can be reached."""

    def reached(self) -> None:
        if self.away:
            raise ConnectionError("nobody answers")

    def opened(self, id: str | None) -> str:
        self.reached()
        id = id or f"run{len(self.runs)}"
        self.runs.setdefault(id, Kept()).opened += 1
        return id

    def sent(self, id: str, step: int, values: dict[str, float]) -> None:
        self.reached()
        self.runs[id].log.append((step, values))


class WandBRun:
    """As wandb has it."""

    def __init__(self, service: Service, id: str | None, config: dict[str, Any] | None) -> None:
        self.service, self.id = service, service.opened(id)
        self.own = service.runs[self.id]
        self.own.config |= config or {}
        self.step = max((step for step, _ in self.own.log), default=-1) + 1

    def log(self, values: dict[str, Any], step: int) -> None:
        ((name, value), *_) = values.items()
        if isinstance(value, Path):
            self.own.pictures.append((step, name, value.read_bytes()))
        else:
            self.service.sent(self.id, step, values)

    def finish(self, exit_code: int) -> None:
        self.own.closed.append(exit_code == 0)


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class MlflowClient:
    """As MLflow has it."""

    service: Service

    def get_experiment_by_name(self, name: str) -> None:
        self.service.reached()

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment == "leanmim"
        return SimpleNamespace(info=SimpleNamespace(run_id=self.service.opened(None)))

    def update_run(self, id: str, status: str) -> None:
        assert status == "RUNNING"
        self.service.opened(id)

    def get_metric_history(self, id: str, key: str) -> list[Metric]:
        return [Metric(key, values[key], 0, step) for step, values in self.service.runs[id].log if key in values]

    def log_batch(self, id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.service.reached()
        self.service.runs[id].config |= {param.key: param.value for param in params}
        if metrics:
            self.service.sent(id, metrics[0].step, {metric.key: metric.value for metric in metrics})

    def log_artifact(self, id: str, path: str, folder: str) -> None:
        step = int(Path(path).stem.removeprefix("step-"))
        self.service.runs[id].pictures.append((step, folder, Path(path).read_bytes()))

    def set_terminated(self, id: str, status: str) -> None:
        self.service.runs[id].closed.append(status == "FINISHED")


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Service]]:
    """In place of the packages, whether they are installed or not."""
    found = {name: Service() for name in NAMES}

    def init(project: str, name: str, dir: str, id: str | None, resume: str, config: Any, settings: Any) -> WandBRun:
        assert (project, resume, settings) == ("leanmim", "allow", {"console": "off"})
        return WandBRun(found["wandb"], id, config)

    client = type("Client", (MlflowClient,), {"service": found["mlflow"]})
    for name, module in {
        "wandb": SimpleNamespace(init=init, Settings=dict, Image=Path),
        "mlflow": SimpleNamespace(MlflowClient=client),
        "mlflow.entities": SimpleNamespace(Metric=Metric, Param=Param),
    }.items():
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    yield found


def logged(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """metrics.jsonl, as a tracker has it."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], {key: value for key, value in line.items() if key != "step"}) for line in found]


def test_pre_training_reports_to_both_and_goes_on_in_their_runs(tiny: Pretrain, services: dict[str, Service]) -> None:
    config = replace(tiny, track=NAMES, epochs=1, show_every="auto")
    run = pretrain(config)
    pretrain(replace(config, epochs=2))
    drawn = {step: path.read_bytes() for step, path in Run(run).strips().items()}
    assert len(lines(config)) == 8 and {"loss", "lr", "images_per_second"} <= lines(config)[0].keys()
    ids = json.loads((run / "trackers.json").read_text())
    for name, service in services.items():
        (id, own), *others = service.runs.items()
        assert not others and ids[name] == id
        assert own.log == logged(run)
        assert own.pictures == [(step, "reconstructions_over_time", drawn[step]) for step in (0, 1, 2, 4, 8)]
        assert (own.opened, own.closed) == (2, [True, True])
        assert str(own.config["mask_ratio"]) == "0.75" and str(own.config["epochs"]) == "1"  # once
    pretrain(replace(config, overwrite=True, epochs=1, seed=1))
    assert all(len(service.runs) == 2 for service in services.values())


def trained(folder: Path, services: dict[str, Service], start: int, stop: int, away: range = range(0)) -> list[str]:
    """Steps of a number, with a line each; what was said of trackers. They are away in some steps."""
    said: list[str] = []
    config = replace(MAE, data="-", out=str(folder), track=NAMES, log_every=1)
    console = Console(quiet=True)
    console.print = lambda text: said.append(str(text))  # type: ignore[method-assign, assignment]
    state = {"step": start} if start else None
    with Loop(Run(folder), config, stop, state, ALONE, torch.device("cpu"), "toy", console) as loop:
        for step in loop.until(stop):
            for service in services.values():
                service.away = step in away
            loop.record(torch.ones(1) * step, images=1, epoch=(step + 1) / 4, lr=0.1)
            for sender in loop.trackers:
                wait_for(sender)
    return [text for text in said if "Training goes on" in text or "lacks" in text]


def wait_for(sender: trackers.Sender) -> None:
    """Until it has tried to send all."""
    for _ in range(2000):
        if sender.coming.empty() and (sender.fault or not sender.kept):
            return
        sender.thread.join(0.005)
    raise AssertionError("it hangs")


def test_a_tracker_that_is_away_is_told_once_and_gets_its_lines_later(
    services: dict[str, Service], tmp_path: Path
) -> None:
    said = trained(tmp_path, services, 0, 8, range(2, 5))
    assert len(said) == 2 and all("ConnectionError: nobody answers. Training goes on" in text for text in said)
    for service in services.values():
        (own,) = service.runs.values()
        assert own.log == logged(tmp_path)


def test_no_line_waits_for_a_picture_that_is_not_taken(
    services: dict[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no room for files")

    for kind in (trackers.WandB, trackers.MLflow):
        monkeypatch.setattr(kind, "show", refuse)
    said: list[str] = []
    for name in NAMES:
        sender = trackers.Sender(
            name, trackers.TRACKERS[name](Run(tmp_path), replace(MAE, data="-", out="-"), None), said.append
        )
        for what in (trackers.Picture(0, "drawn", tmp_path / "step-0.png"), {"step": 1, "loss": 1.0}):
            sender.add(what)
        sender.close(True)
    assert said == [
        f"{name} did not take step-0.png (PermissionError: no room for files); pictures that it does not take are left out"
        for name in NAMES
    ]
    assert [own.log for service in services.values() for own in service.runs.values()] == 2 * [[(1, {"loss": 1.0})]]


def test_what_a_tracker_missed_it_gets_when_the_run_is_continued(services: dict[str, Service], tmp_path: Path) -> None:
    said = trained(tmp_path, services, 0, 4, range(2, 4))
    assert sum("lacks the last lines of metrics.jsonl (nobody answers)" in text for text in said) == 2
    said = trained(tmp_path, services, 4, 5, range(9))  # still away
    assert len(said) == 2 and all("cannot be opened (ConnectionError: nobody answers)" in text for text in said)
    for service in services.values():
        service.away = False
    assert trained(tmp_path, services, 5, 6) == []
    for service in services.values():
        (own,) = service.runs.values()
        assert own.log == logged(tmp_path) and len(own.log) == 6


def test_a_run_that_failed_is_closed_as_such(services: dict[str, Service], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diverged"):
        fail(tmp_path)
    assert [own.closed for service in services.values() for own in service.runs.values()] == [[False], [False]]


def fail(folder: Path) -> None:
    """A step that is not finite, and may not be."""
    config = replace(MAE, data="-", out=str(folder), track=NAMES)
    with Loop(Run(folder), config, 4, None, ALONE, torch.device("cpu"), "toy", Console(quiet=True)) as loop:
        for _ in loop.until(4):
            loop.record(torch.ones(1) * torch.nan, images=1, epoch=1.0, lr=0.1)


def test_a_tracker_that_cannot_be_opened_ends_a_run_that_begins(services: dict[str, Service], tmp_path: Path) -> None:
    services["mlflow"].away = True
    with pytest.raises(
        UserError, match=r"--track mlflow cannot be opened .* see to its login and address, or leave it out"
    ):
        trained(tmp_path, services, 0, 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for command in (["pretrain", "mae"], ["finetune", "run"]):
        text = refused([*command, "--data", "photos", "--out", "new", "--track", "wandb"])
        assert "--track wandb needs the package wandb: pip install wandb" in text
    with pytest.raises(UserError, match="pip install wandb"):
        Probe(run="run", data="labelled", track=("wandb",)).check()


def test_others_are_no_trackers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "mae", "--data", "photos", "--out", "new", "--track", "neptune"])
    assert "wandb" in capsys.readouterr().err
