"""Tasks side by side."""

from pathlib import Path
from typing import Any

import pytest
import torch

from leanmim.comparison import processes, worker
from leanmim.comparison.processes import Task, last_words, places_of, run_tasks, time_left
from leanmim.errors import UserError
from tests.comparison.fakes import Ended, tiny_comparison

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_is_shared_by_as_many_processes_as_there_are_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cpus", lambda: 8)
    found = [places_of(tiny_comparison(tmp_path, jobs=jobs), CPU) for jobs in ("auto", 2, 16)]
    assert [(len(places), {place["OMP_NUM_THREADS"] for place in places}) for places in found] == [
        (4, {"2"}), (2, {"4"}), (16, {"1"}),  # two recipes, two seeds
    ]  # fmt: skip


def test_gpus_are_given_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert len(places_of(tiny_comparison(tmp_path), CUDA)) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def devices(jobs: Any) -> list[str]:
        return [place["CUDA_VISIBLE_DEVICES"] for place in places_of(tiny_comparison(tmp_path, jobs=jobs), CUDA)]

    assert devices("auto") == ["0", "1"] and devices(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert devices("auto") == ["5", "GPU-7"]


def test_no_more_run_at_once_than_there_are_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    most = 0

    class Process(Ended):
        polled = 0

        def poll(self) -> Any:
            self.polled += 1
            return 0 if self.polled == 3 else None

    def launch(task: Task, place: dict[str, str]) -> Process:
        nonlocal most
        started.append(place["n"])
        most = max(most, len(started) - len(done))
        return Process()

    done: list[str] = []
    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(processes, "POLL", 0.0)
    tasks = [Task("cell", str(i), tmp_path / str(i)) for i in range(5)]
    assert run_tasks(tasks, [{"n": "a"}, {"n": "b"}], "", lambda task: done.append(task.name) or "") == []
    assert done == list("01234") and most == 2 and set(started) == {"a", "b"}


def test_what_killed_a_task_is_told_and_not_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("cell", "mae", tmp_path)
    task.log.write_text("leanmim: an error of an earlier try\nstep 400/1890\n")
    for code, told in ((-9, "killed by SIGKILL, as is what takes more memory than there is; try fewer --jobs"),
                       (-11, "killed by SIGSEGV")):  # fmt: skip
        monkeypatch.setattr(processes, "launch", lambda task, place, code=code: Ended(code))
        assert run_tasks([task], [{}], "") == [task]
        assert last_words(task) == told


def test_time_left() -> None:
    baseline, trained = (Task("cell", name, Path(name), seconds) for name, seconds in (("a", 0.0), ("b", 600.0)))
    assert time_left({baseline: 60.0}, [trained, trained], 2) == ", about 11 min left"  # 600 s, and 60 s of evaluation
    assert time_left({baseline: 60.0, trained: 900.0}, [trained, trained, baseline], 1) == ", about 31 min left"
    assert time_left({baseline: 60.0}, [], 2) == ""


def test_all_of_an_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(folder: Path) -> None:
        raise UserError(f"{folder} holds another run:\n  epochs: 2 there, 3 now\nGive the same options")

    monkeypatch.setitem(worker.TASKS, "cell", refuse)
    monkeypatch.setattr("sys.argv", ["worker", "cell", "here"])
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    with pytest.raises(SystemExit):
        worker.main()
    task = Task("cell", "mae", tmp_path)
    task.log.write_text(f"step 3\n{capsys.readouterr().out}\n")
    assert last_words(task) == "here holds another run: epochs: 2 there, 3 now Give the same options"
