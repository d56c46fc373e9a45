"""The one resumable loop, with a step of its own: a number that grows."""

import io
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from leanmim.config import Logging
from leanmim.errors import UserError
from leanmim.loop import SIGNALS, Loop, Stopped
from leanmim.processes import ALONE
from leanmim.run import Run, load

CPU = torch.device("cpu")
STEPS = 8
Do = Callable[[], object]


def nothing() -> None:
    """As most steps."""


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
    config: Logging,
    within: dict[int, Do] | None = None,
    each: Do = nothing,
    read: Do = nothing,
    diverges: int = 0,
    **more: Any,
) -> list[int]:
    """Run the loop, or continue it.

    Args:
        folder: of the run.
        config: how often.
        within: what happens in some steps, counted from 1.
        each: what happens in every step.
        read: what happens while the step's data is read.
        diverges: the step whose second loss is not a number.
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
    with Loop(run, config, STEPS, state, ALONE, CPU, "toy") as loop:
        items = loop.timed(feed())
        for step in loop.until(STEPS):
            assert next(items) == step
            (within or {}).get(step + 1, nothing)()
            each()
            value = value * 1.1 + step
            losses = torch.tensor([value, math.nan if step + 1 == diverges else 1.0])
            loop.record(losses, images=4, epoch=(step + 1) / 4, lr=0.5, **more)
            if loop.checkpoint_due:
                loop.save({"value": value})
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
    toy(tmp_path, Logging(log_every=3), each=lambda: clock.wait(2), read=lambda: clock.wait(0.5))
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


def test_a_line_can_be_asked_for(tmp_path: Path) -> None:
    toy(tmp_path, Logging(log_every=100), line=True)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("every", "minutes", "checkpoints", "logged"),
    [
        (1, 10.0, [8], [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 1.0, [2, 4, 6, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 1.0, [3, 6, 8], [3, 6, 8]),  # with a line each
        (3, 0.0, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_checkpoints_follow_the_clock(
    every: int, minutes: float, checkpoints: list[int], logged: list[int], tmp_path: Path, clock: Clock
) -> None:
    """By a clock on which a step takes half a minute."""
    config = Logging(log_every=every, checkpoint_minutes=minutes)
    assert toy(tmp_path, config, each=lambda: clock.wait(30)) == checkpoints
    assert [line["step"] for line in lines(tmp_path)] == logged
    assert load(Run(tmp_path).last)["step"] == 8


def test_what_is_paused_is_no_time_of_training(tmp_path: Path, clock: Clock) -> None:
    with Loop(Run(tmp_path), Logging(log_every=1), 1, None, ALONE, CPU, "toy") as loop:
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


@pytest.mark.parametrize(("every", "minutes", "last"), [(1, 0.0, 4), (3, 10.0, None)])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(
    every: int, minutes: float, last: int | None, tmp_path: Path
) -> None:
    config = Logging(log_every=every, checkpoint_minutes=minutes)
    with pytest.raises(UserError, match=r"nan.* at step [56]: training diverged; lower --blr"):
        toy(tmp_path, config, diverges=5)
    run = Run(tmp_path)
    assert (load(run.last)["step"] if run.last.exists() else None) == last
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


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
    assert toy(tmp_path, Logging(), {4: lambda: os.kill(os.getpid(), signal.SIGHUP)}) == [8]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step 4, with a checkpoint") as stop:
        toy(tmp_path, Logging(log_every=3), {4: lambda: os.kill(os.getpid(), number)})
    assert stop.value.number == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    state = load(Run(tmp_path).last)
    assert (state["step"], state["value"]) == (4, values()[3])
    assert [line["step"] for line in lines(tmp_path)] == [3]


@pytest.mark.parametrize("stops", [*([n] for n in range(1, 9)), [4, 5], [2, 3, 7]])
def test_stopped_and_continued_it_writes_the_same_lines(stops: list[int], tmp_path: Path) -> None:
    """Also between two lines, and more than once."""
    config = Logging(log_every=3)
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
        toy(tmp_path, Logging(), {4: twice})
    assert not isinstance(stop.value, Stopped)
    assert not Run(tmp_path).last.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_of_the_main_thread_it_leaves_signals_alone(tmp_path: Path) -> None:
    saved: list[int] = []
    thread = threading.Thread(target=lambda: saved.extend(toy(tmp_path, Logging())))
    thread.start()
    thread.join()
    assert saved == [8]


def test_a_long_run_says_twenty_lines_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Loop(Run(tmp_path), Logging(log_every=1), 100, None, ALONE, CPU, "toy") as loop:
        for _ in loop.until(100):
            clock.wait(60)
            loop.record(torch.ones(1), images=4, epoch=loop.done / 10, lr=0.1)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == [f"{step}/100" for step in range(5, 101, 5)]
    assert said[0].endswith("GiB  left 1.6 h") and said[-2].endswith("left 5.0 min") and said[-1].endswith("took 1.7 h")


def terminal() -> Console:
    """A terminal of 80 columns."""
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


def test_the_bar_moves_every_step_and_asks_nothing_of_the_device(tmp_path: Path, clock: Clock) -> None:
    """Losses on the meta device cannot be read."""
    with Loop(Run(tmp_path), Logging(log_every=50), 40, None, ALONE, CPU, "toy", terminal()) as loop:
        (task,) = loop.progress.tasks
        for step in loop.until(3):
            clock.wait(20)
            loop.record(torch.ones(1, device="meta"), images=4, epoch=0.1, lr=0.1)
            assert task.completed == step + 1
            assert task.fields["text"].strip() == f"left {20 * (39 - step) / 60:.0f} min"


def test_of_a_continued_run_the_speed_is_that_of_this_call(tmp_path: Path, clock: Clock) -> None:
    with Loop(Run(tmp_path), Logging(log_every=50), 40, {"step": 30}, ALONE, CPU, "toy", terminal()) as loop:
        for _ in loop.until(31):
            clock.wait(20)
            loop.record(torch.ones(1), images=4, epoch=0.1, lr=0.1)
        assert loop.time_left == "left 3.0 min"


def test_the_bar_stays_with_the_final_loss_and_the_time_and_fits_80_columns(tmp_path: Path, clock: Clock) -> None:
    console = terminal()
    with Loop(Run(tmp_path), Logging(log_every=1), 20, None, ALONE, CPU, "fastmim-p", console) as loop:
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
    with Loop(Run(tmp_path), Logging(), 8, {"step": 8}, ALONE, CPU, "toy", console) as loop:
        assert not list(loop.until(8))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_signal_keeps_no_diverged_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training diverged"):
        toy(tmp_path, Logging(log_every=3), {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}, diverges=2)
    assert not Run(tmp_path).last.exists()
