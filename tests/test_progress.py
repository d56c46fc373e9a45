"""Progress bars: on a terminal only, with the time left from the first item on."""

import re

import pytest

from leanmim.progress import duration, time_left, track


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (45.2, "45 s"), (90.0, "1.5 min"), (720.0, "12 min"), (12_400.0, "3.4 h"), (360_000.0, "100 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_is_known_after_the_first_step() -> None:
    assert time_left(10.0, 1, 72) == "left 12 min"
    assert time_left(730.0, 73, 0) == "took 12 min"


@pytest.mark.usefixtures("terminal")
def test_a_bar_on_the_standard_error_shows_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr("rich.progress.Progress.update", updated := Recorder())
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert updated.texts == ["left 3.3 min", "left 1.7 min", "took 5.0 min"]
    out, err = capsys.readouterr()
    assert out == "" and "letters" in err


class Recorder:
    """Takes down how a bar is moved."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, task: int, completed: int, text: str) -> None:
        assert completed == len(self.texts) + 1
        self.texts.append(text)


@pytest.mark.usefixtures("terminal")
def test_the_bar_is_gone_when_its_items_fail(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> object:
        yield 1
        raise ValueError

    with pytest.raises(ValueError):
        list(track(broken(), "letters", 3))
    err = capsys.readouterr().err
    assert re.search(r"letters.*33%", err) and err.endswith("\x1b[1A\x1b[2K")  # the line is cleared


@pytest.mark.usefixtures("terminal")
def test_of_many_processes_the_first_draws(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_where_there_is_no_terminal_nothing_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
