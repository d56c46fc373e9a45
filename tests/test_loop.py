"""The one resumable loop, with a step of its own: a number that grows."""

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanmim.checkpoint import unpack as load  # what a loop saves need not be a run's
from leanmim.config import Pretrain
from leanmim.errors import CannotWrite, UserError
from leanmim.log import Growing
from leanmim.loop import Loop
from leanmim.processes import ALONE
from leanmim.recipes import MAE
from leanmim.run import Run
from leanmim.signals import SIGNALS, Stopped

CPU = torch.device("cpu")
STEPS = 8
RUN: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "model": {}, "optimizers": []}  # of any checkpoint
Do = Callable[[], object]


def nothing() -> None:
    """As most steps."""


def logging(**changes: Any) -> Pretrain:
    """How often, by default as the recipes have it."""
    return replace(MAE, data="-", out="-", **changes)


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def toy(
    folder: Path,
    config: Pretrain,
    within: dict[int, Do] | None = None,
    each: Do = nothing,
    read: Do = nothing,
    skips: Container[int] = (),
    **more: Any,
) -> list[int]:
    """Run the loop, or continue it.

    Args:
        folder: of the run.
        config: how often.
        within: what happens in some steps, counted from 1.
        each: what happens in every step.
        read: what happens while the step's data is read.
        skips: the steps whose second loss is not a number.
        more: arguments of `Loop.record`.

    Returns:
        The steps after which a checkpoint was written.
    """
    run = Run(folder)
    state = load(run.last) if run.last.exists() else None
    start, value = (state["step"], state["value"]) if state else (0, 1.0)
    run.prepare(config, start)

    def feed() -> Any:
        for step in range(start, STEPS):
            read()
            yield step

    saved = []
    with Loop(
        run, config, STEPS, state, ALONE, CPU, "toy", None, config.max_bad_steps, lambda step: {"seeds": [step]}
    ) as loop:
        items = loop.timed(feed())
        for step in loop.until(STEPS):
            assert next(items) == step
            (within or {}).get(step + 1, nothing)()
            each()
            value = value * 1.1 + step
            losses = torch.tensor([value, math.nan if step + 1 in skips else 1.0])
            loop.record(losses, images=4, epoch=(step + 1) / 4, lr=0.5, **more)
            if loop.checkpoint_due:
                loop.save({**RUN, "config": config.to_json(), "value": value})
                saved.append(loop.done)
    return saved


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(folder).metrics.read_text().splitlines()]


def values() -> list[float]:
    """The first loss of every step."""
    found = [1.0]
    for step in range(STEPS):
        found.append(found[-1] * 1.1 + step)
    return found[1:]


def test_a_line_is_the_mean_of_the_steps_since_the_last_one(tmp_path: Path, clock: Clock) -> None:
    toy(tmp_path, logging(log_every=3), each=lambda: clock.wait(2), read=lambda: clock.wait(0.5))
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 8]
    for line, part in zip(found, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
        own = values()[part]
        assert line["loss_0"] == pytest.approx(sum(own) / len(own))
        assert line["loss_1"] == 1.0
        assert line["loss"] == pytest.approx((line["loss_0"] + 1) / 2)
        assert line["seconds"] == pytest.approx(2.5 * len(own))
        assert line["images_per_second"] == pytest.approx(4 / 2.5)
        assert line["data_wait"] == pytest.approx(0.5 / 2.5)
        assert (line["epoch"], line["lr"]) == (line["step"] / 4, 0.5)


@pytest.mark.parametrize(("wait", "said"), [(2.0, 1), (0.5, 0)])
def test_who_waits_for_images_is_told_once_what_to_do(
    wait: float, said: int, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path, logging(log_every=1), each=lambda: clock.wait(8), read=lambda: clock.wait(wait))
    text = capsys.readouterr().out
    assert text.count("waiting for images takes 20% of the time, without it a step were 1.2 times as fast") == said
    assert text.count("leanmim pack") == said


def test_a_line_can_be_asked_for(tmp_path: Path) -> None:
    toy(tmp_path, logging(log_every=100), line=True)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("every", "minutes", "checkpoints", "logged"),
    [
        (1, 10.0, [1, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 1.0, [1, 3, 5, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 1.0, [1, 3, 6, 8], [3, 6, 8]),  # all but the first with a line
        (3, 0.0, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_first_checkpoint_comes_early_and_others_follow_the_clock(
    every: int, minutes: float, checkpoints: list[int], logged: list[int], tmp_path: Path, clock: Clock
) -> None:
    """By a clock on which a step takes half a minute."""
    config = logging(log_every=every, checkpoint_minutes=minutes)
    assert toy(tmp_path, config, each=lambda: clock.wait(30)) == checkpoints
    assert [line["step"] for line in lines(tmp_path)] == logged
    assert load(Run(tmp_path).last)["step"] == 8


def test_what_is_paused_is_no_time_of_training(tmp_path: Path, clock: Clock) -> None:
    with Loop(Run(tmp_path), logging(log_every=1), 1, None, ALONE, CPU, "toy") as loop:
        for _ in loop.until(1):
            clock.wait(2)
            with loop.paused():
                clock.wait(100)
            loop.record(torch.ones(1), images=6, epoch=1.0, lr=0.1)
            loop.write(knn=0.5)
        assert loop.images_per_second == pytest.approx(3)
    (line, other) = lines(tmp_path)
    assert line["seconds"] == pytest.approx(2)
    assert "loss_0" not in line  # of one segment
    assert other == {"step": 1, "knn": 0.5}


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(folder).bad_steps.read_text().splitlines()]


def test_a_step_that_was_skipped_is_listed_and_has_no_part_in_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path, logging(log_every=3), skips={5, 7, 8})
    found, own = lines(tmp_path), values()
    assert [line.get("bad_steps") for line in found] == [None, 1, 2]
    assert found[1]["loss_0"] == pytest.approx((own[3] + own[5]) / 2)
    assert "loss" not in found[2] and "loss_0" not in found[2]
    assert [line["step"] for line in skipped(tmp_path)] == [5, 7, 8]
    assert skipped(tmp_path)[0] == {
        "step": 5, "lr": 0.5, "rank": 0, "losses": [pytest.approx(own[4]), None], "seeds": [4],
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "step 5/8  skipped, number 1 in a row: a loss or gradient is not finite" in said
    assert "step 8/8  skipped, number 2 in a row: a loss or gradient is not finite" in said
    assert load(Run(tmp_path).last)["step"] == 8


@pytest.mark.parametrize("stop", [None, 4, 5])
def test_too_many_in_a_row_end_the_run_and_keep_the_checkpoint_from_before(stop: int | None, tmp_path: Path) -> None:
    """Also when it was stopped among them."""
    config = logging(log_every=3, checkpoint_minutes=0.0, max_bad_steps=2)
    skips = {2, 4, 5, 6}
    if stop:
        with pytest.raises(Stopped):
            toy(tmp_path, config, {stop: lambda: os.kill(os.getpid(), signal.SIGTERM)}, skips=skips)
        assert load(Run(tmp_path).last)["bad_steps"] == stop - 3
    with pytest.raises(UserError, match=r"not finite in step 6, number 3 in a row .*lower --blr"):
        toy(tmp_path, config, skips=skips)
    assert load(Run(tmp_path).last)["step"] == (stop or 3)
    assert [line["step"] for line in skipped(tmp_path)] == [2, 4, 5, 6]


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    run, config = Run(tmp_path), logging(log_every=1, checkpoint_minutes=0.0)
    with Loop(run, config, 2, None, ALONE, CPU, "toy") as loop:
        for step in loop.until(2):
            loop.record(torch.ones(1), images=4, epoch=1.0, lr=0.1)
            state = {**RUN, "config": config.to_json(), "model": {"scale": torch.tensor([1.0, (1.0, math.inf)[step]])}}
            if step == 0:
                loop.save(state)
                continue
            with pytest.raises(UserError, match=r"after step 2 the weight scale is not finite.*lower --blr"):
                loop.save(state)
    assert load(run.last)["step"] == 1


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Signals as in a terminal: a shell's background job ignores SIGINT, and so do its children."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert toy(tmp_path, logging(), {4: lambda: os.kill(os.getpid(), signal.SIGHUP)}) == [1, 8]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step 4, with a checkpoint") as stop:
        toy(tmp_path, logging(log_every=3), {4: lambda: os.kill(os.getpid(), number)})
    assert stop.value.number == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    state = load(Run(tmp_path).last)
    assert (state["step"], state["value"]) == (4, values()[3])
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_a_terminal_that_was_closed_is_not_written_to(tmp_path: Path) -> None:
    """It would raise an error."""

    class Gone(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    screen, config = Gone(), logging(log_every=1)
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with pytest.raises(Stopped), Loop(Run(tmp_path), config, STEPS, None, ALONE, CPU, "toy", console) as loop:
        for step in loop.until(STEPS):
            if step == 3:
                os.kill(os.getpid(), signal.SIGHUP)
                screen.gone = True
            loop.record(torch.ones(1), images=4, epoch=1.0, lr=0.1)
            loop.console.print("a line")
            if loop.checkpoint_due:
                loop.save({**RUN, "config": config.to_json()})
    assert load(Run(tmp_path).last)["step"] == 4


@pytest.mark.parametrize("stops", [*([n] for n in range(1, 9)), [4, 5], [2, 3, 7]])
def test_stopped_and_continued_it_writes_the_same_lines(stops: list[int], tmp_path: Path) -> None:
    """Also between two lines, and more than once."""
    config = logging(log_every=3)
    toy(tmp_path / "whole", config)
    for step in stops:
        with pytest.raises(Stopped):
            toy(tmp_path / "run", config, {step: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    toy(tmp_path / "run", config)
    found, want = (
        [(line["step"], line["loss"], line["loss_0"], line["epoch"]) for line in lines(tmp_path / name)]
        for name in ("run", "whole")
    )
    assert found == want
    one, two = (load(Run(tmp_path / name).last) for name in ("run", "whole"))
    assert one == two


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.001)  # two signals that come together are one to Python 3.10
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        toy(tmp_path, logging(), {4: twice})
    assert not isinstance(stop.value, Stopped)
    assert load(Run(tmp_path).last)["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_of_the_main_thread_it_leaves_signals_alone(tmp_path: Path) -> None:
    saved: list[int] = []
    thread = threading.Thread(target=lambda: saved.extend(toy(tmp_path, logging())))
    thread.start()
    thread.join()
    assert saved == [1, 8]


def test_a_long_run_says_twenty_lines_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Loop(Run(tmp_path), logging(log_every=1), 100, None, ALONE, CPU, "toy") as loop:
        for _ in loop.until(100):
            clock.wait(60)
            loop.record(torch.ones(1), images=4, epoch=loop.done / 10, lr=0.1)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == [f"{step}/100" for step in range(5, 101, 5)]
    assert said[0].endswith("GiB  left 1.6 h") and said[-2].endswith("left 5.0 min") and said[-1].endswith("took 1.7 h")


def terminal() -> Console:
    """A terminal of 80 columns."""
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


def test_the_bar_moves_every_step(tmp_path: Path, clock: Clock) -> None:
    with Loop(Run(tmp_path), logging(log_every=50), 40, None, ALONE, CPU, "toy", terminal()) as loop:
        (task,) = loop.progress.tasks
        for step in loop.until(3):
            clock.wait(20)
            loop.record(torch.ones(1), images=4, epoch=0.1, lr=0.1)
            assert task.completed == step + 1
            assert task.fields["text"].strip() == f"left {20 * (39 - step) / 60:.0f} min"


def test_of_a_continued_run_the_speed_is_that_of_this_call(tmp_path: Path, clock: Clock) -> None:
    with Loop(Run(tmp_path), logging(log_every=50), 40, {"step": 30}, ALONE, CPU, "toy", terminal()) as loop:
        for _ in loop.until(31):
            clock.wait(20)
            loop.record(torch.ones(1), images=4, epoch=0.1, lr=0.1)
        assert loop.time_left == "left 3.0 min"


def test_the_bar_stays_with_the_final_loss_and_the_time_and_fits_80_columns(tmp_path: Path, clock: Clock) -> None:
    console = terminal()
    with Loop(Run(tmp_path), logging(log_every=1), 20, None, ALONE, CPU, "fastmim-p", console) as loop:
        for _ in loop.until(20):
            clock.wait(200)
            loop.record(torch.tensor([0.12344]), images=1_000_000, epoch=0.1, lr=0.1)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    last = re.findall(r"fastmim-p [^\r\n]*", drawn)[-1]
    assert re.fullmatch(r"fastmim-p ━{8} 100% took 1.1 h loss 0.1234 5000 images/s wait 0% \d+\.\d GiB", last)
    assert len(last) <= 80
    assert not drawn.endswith("\x1b[1A\x1b[2K")  # which would clear it


def test_a_finished_run_draws_no_bar(tmp_path: Path) -> None:
    console = terminal()
    with Loop(Run(tmp_path), logging(), 8, {"step": 8}, ALONE, CPU, "toy", console) as loop:
        assert not list(loop.until(8))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: for each name the steps and values."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After signals, with a clock that is set back, and when a finished run is given again."""
    now, config = time.time(), logging(log_every=2)
    for call, stop in enumerate((3, 5, None, None)):
        monkeypatch.setattr("time.time", lambda call=call: now - 3600 * call)
        with pytest.raises(Stopped) if stop else nullcontext():
            toy(tmp_path, config, {stop: lambda: os.kill(os.getpid(), signal.SIGTERM)} if stop else {})
        found, held = events(tmp_path), lines(tmp_path)
        assert found.keys() == held[0].keys() - {"step"}
        for name, points in found.items():
            assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in held], name
    assert [line["step"] for line in held] == [2, 4, 6, 8]


class Disk:
    """It can be full, for a while."""

    full = False

    def open(self, *arguments: Any, **options: Any) -> Any:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(*arguments, **options)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    for name in ("log", "checkpoint"):
        monkeypatch.setattr(f"leanmim.{name}.open", disk.open, raising=False)
    return disk


def test_while_the_disk_is_full_training_goes_on_and_says_so_once(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    within = {3: lambda: setattr(disk, "full", True), 6: lambda: setattr(disk, "full", False)}
    kept = []
    toy(
        tmp_path,
        logging(log_every=1, checkpoint_minutes=0.0),
        {**within, 5: lambda: kept.append(load(Run(tmp_path).last)["step"])},
    )
    assert kept == [2]
    assert load(Run(tmp_path).last)["step"] == 8
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    assert [step for step, _ in events(tmp_path)["loss"]] == list(range(1, 9))
    said = capsys.readouterr().out
    for part in ("log", "checkpoint"):
        assert said.count(f"Training goes on, and tries again to write the {part}") == 1
    assert "step 3/8  '" in said and "No space left on device" in said


@pytest.mark.parametrize("stopped", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_with_room_the_run_continues(
    tmp_path: Path, disk: Disk, stopped: bool
) -> None:
    """At the end of the run, or where a signal asked for it."""
    within: dict[int, Do] = {3: lambda: setattr(disk, "full", True)}
    if stopped:
        within[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(CannotWrite, match=r"cannot be written: No space left on device.*make room on the disk"):
        toy(tmp_path, logging(log_every=1), within)
    assert load(Run(tmp_path).last)["step"] == 1
    disk.full = False
    toy(tmp_path, logging(log_every=1))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    assert load(Run(tmp_path).last)["value"] == values()[-1]


def test_a_line_that_has_room_for_a_part_only_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Growing(tmp_path / "lines")
    file.add(b"one\n")
    file.flush()

    class Half(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2])

    with monkeypatch.context() as patch, pytest.raises(CannotWrite, match="No space left"):
        patch.setattr("leanmim.log.open", lambda path, mode, buffering: Half(path, mode), raising=False)
        file.add(b"two\n")
        file.flush()
    assert file.path.read_bytes() == b"one\n"
    file.flush()
    assert file.path.read_bytes() == b"one\ntwo\n"


def test_a_run_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    toy(tmp_path, logging(log_every=1, checkpoint_minutes=0.0), {4: lambda: shutil.rmtree(tmp_path)})
    run = Run(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [4, 5, 6, 7, 8]
    assert load(run.last)["step"] == 8
    assert run.stored()["recipe"] == "mae"
    assert events(tmp_path)["loss"][-1][0] == 8
