"""Signals at odd moments: what the message says is true, and the same command continues, bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.fake import fake_tensors
from leanmim.run import Run, load
from leanmim.signals import SIGNALS, Stopped, stoppable
from leanmim.train import pretrain as command_of
from leanmim.train import training
from leanmim.train.pretrain import pretrain
from tests.helpers import equal, growing, three_classes
from tests.process_faults import Fault, together
from tests.runs import arguments, lines


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """As in a terminal: a shell's background job ignores SIGINT, and so do its children."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(function: Callable[..., Any], number: int, call: int = 1) -> Callable[..., Any]:
    """The same function; before it does anything in this call of it, the signal comes."""
    calls = 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return wrapper


def same_end(one: Pretrain, other: Pretrain) -> bool:
    """Weights, moments and the log."""
    states = [load(Run(Path(config.out)).last) for config in (one, other)]
    logs = [[(line["step"], line.get("loss"), line.get("knn")) for line in lines(config)] for config in (one, other)]
    return logs[0] == logs[1] and all(equal(states[0][key], states[1][key]) for key in ("step", "model", "optimizers"))


def test_during_an_evaluation(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is finished, and no further step is taken."""
    config = replace(tiny, knn_data=three_classes(tmp_path / "labelled"), knn_every=1, log_every=3, blr=0.01)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="by SIGTERM after step 4, with a checkpoint"):
        patch.setattr(training, "knn_accuracy", signalled(training.knn_accuracy, signal.SIGTERM))
        pretrain(config)
    assert load(Run(Path(config.out)).last)["step"] == 4
    assert "knn" in lines(config)[-1]
    pretrain(config)
    assert same_end(config, whole)


def test_during_a_change_of_phase(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = growing(tiny)
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 5, with a checkpoint"):
        patch.setattr(training, "at_next_size", signalled(training.at_next_size, signal.SIGHUP))
        pretrain(config)
    pretrain(config)
    assert same_end(config, whole)


@pytest.mark.results
@pytest.mark.parametrize(("moment", "number"), [("open_source", signal.SIGHUP), ("write_export", signal.SIGTERM)])
def test_before_and_after_the_steps_it_ends_at_once(
    moment: str, number: signal.Signals, tiny: Pretrain, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = replace(tiny, epochs=1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(command_of, moment, signalled(getattr(command_of, moment), number))
        main(arguments(config))
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == (
        f"leanmim: stopped by {number.name}; the same command continues from the last checkpoint, if one was written\n"
    )
    assert signal.getsignal(number) == signal.SIG_DFL
    assert Run(Path(config.out)).last.exists() == (moment != "open_source")
    main(arguments(config))
    assert (Path(config.out) / "report.html").exists()


def test_to_two_processes(tiny: Pretrain, tmp_path: Path) -> None:
    """As torchrun passes it on, not to both at the same moment. They stop after the same step, soon, between two lines of the log."""
    config = replace(tiny, epochs=500, log_every=10**6, effective_batch=8)
    run = Run(Path(config.out))
    done = together(tmp_path, arguments(config), faults=[Fault("asked_to_stop", 0, 4), Fault("asked_to_stop", 1, 5)])
    assert done.codes == [128 + signal.SIGTERM] * 2
    step = load(run.last)["step"]
    assert 4 <= step < 20
    for text in done.texts:
        assert f"leanmim: stopped by SIGTERM after step {step}, with a checkpoint" in text


def test_waits_for_the_end_of_a_count() -> None:
    """Where Python is called from C++, an exception of a handler has ended the process with std::terminate."""
    done = []
    with stoppable(), pytest.raises(Stopped, match="SIGTERM"):
        with fake_tensors():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all")
        done.append("more")
    assert done == ["all"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
