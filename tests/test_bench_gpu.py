"""`make bench-gpu` without a GPU: all pieces with tiny models; what goes on, what fails, what is missing."""

import json
import runpy
import signal
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmim.comparison import processes
from tests.comparison.fakes import made_up
from tests.runs import noisy_tiles

FOLDER = Path(__file__).parent.parent / "benchmarks"
CPU = ["predicted", "headline", "transformers", "recipes", "memory", "kernels", "hog", "photos-224-small"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The script's modules, whose pieces run in this process."""
    work = tmp_path_factory.mktemp("bench")
    ran: list[list[str]] = []

    def launch(command: list[str], environment: dict[str, str], limit: float) -> int:
        ran.append(command)
        if command[1] == "-m":  # the tests; they are where they are
            return 0
        patch.setattr(sys, "argv", command[1:])
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import gpu  # type: ignore[import-not-found]
        import record  # type: ignore[import-not-found]

        patch.setattr(record, "RESULTS", work / "results")
        patch.setattr(gpu, "launch", launch)
        patch.setattr(processes, "launch", made_up(lambda cell: 0.5))  # trainings of a comparison
        yield SimpleNamespace(gpu=gpu, record=record, work=work, ran=ran, patch=patch)


def call(bench: SimpleNamespace, *options: str, work: Path | None = None) -> int:
    """The exit code of `make bench-gpu`."""
    bench.ran.clear()
    bench.patch.setattr(sys, "argv", ["gpu.py", *options, "--work", str(work or bench.work)])
    with pytest.raises(SystemExit) as end:
        bench.gpu.main()
    return end.value.code if isinstance(end.value.code, int) else pytest.fail(str(end.value.code))


def result(bench: SimpleNamespace, name: str) -> dict[str, Any]:
    return json.loads((bench.work / "results" / f"{name}.json").read_text())


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in torchao's sources, where nothing keeps them compiled
def test_a_dry_run_of_all_pieces(bench: SimpleNamespace) -> None:
    photos = noisy_tiles(bench.work / "photos", 8, 4)
    assert call(bench, "--dry", "--photos", str(photos), *CPU, "tests") == 0
    headline, recipes = result(bench, "gpu-headline")["table"], result(bench, "gpu-recipes")["table"]
    assert [row["recipe"] for row in headline] == ["bim, 8 segments", "bim, 8 segments"]
    assert [row["recipe"] for row in recipes] == ["mae", "pr-mim"]
    memory = result(bench, "gpu-memory")["table"]
    assert [row["recipe"] for row in memory] == ["mae", "mae, all four"]
    for row in (*headline, *recipes, *memory):
        assert float(row["predicted, GB"]) > 0 and row["error"].endswith("%") and float(row["step, ms"]) > 0
    assert float(result(bench, "gpu-transformers")["table"][0]["saved, ratio"]) < 1.1
    for other in ("kernels-cpu", "hog-speed-cpu", "photos-224-vit_small_patch16_224-gpu"):
        assert result(bench, other)["table"]
    assert "84.1" in (bench.work / "results" / "photos-224-vit_small_patch16_224-gpu.md").read_text()

    bench.patch.setitem(sys.modules, "vs_transformers", None)  # nothing is measured twice
    assert call(bench, "--dry", "headline", "transformers") == 0


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(
    bench: SimpleNamespace, tmp_path: Path, capfd: Any
) -> None:
    import gpu_steps  # type: ignore[import-not-found]

    outcomes: list[Any] = [
        ValueError("no kernel"),
        {"seconds": [1.0], "allocated": 10**9},
        {"seconds": [2.0], "allocated": 10**9},
    ]

    def measured(config: Any, device: Any) -> dict[str, Any]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, ValueError):
            raise outcome
        return outcome

    bench.patch.setattr(gpu_steps, "measured", measured)
    journal = gpu_steps.Journal(tmp_path / "journal.jsonl")
    own = gpu_steps.tiny(gpu_steps.CELLS["recipes"])
    gpu_steps.predict(own, [])
    one = (gpu_steps.torch.device("cpu"), 8.0)
    assert gpu_steps.run("headline", own, journal, *one) == 1
    assert "no kernel" in capfd.readouterr().err
    assert [row["recipe"] for row in result(bench, "gpu-headline")["table"]] == ["pr-mim"]
    with journal.file.open("a") as file:
        file.write('\n{"piece": "headline", "ce')  # killed while it wrote
    assert gpu_steps.run("headline", own, journal, gpu_steps.torch.device("cpu"), 0.1) == 3  # too short for a cell
    assert gpu_steps.run("headline", own, journal, *one) == 0
    assert [row["step, ms"] for row in result(bench, "gpu-headline")["table"]] == ["2000.0", "1000.0"]
    assert not outcomes


def test_a_stop_before_the_first_finished_cell_leaves_no_table(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(processes, "launch", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(bench.record, "RESULTS", tmp_path / "results")
    data = noisy_tiles(tmp_path / "photos", 8, 4)
    argv = ["ablate.py", "cifar10-hog", "--dry", "--data", str(data), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "ablate.py"), run_name="__main__")
    assert end.value.code == 3 and not list(tmp_path.glob("results/*.md"))
    assert "stopped by SIGTERM; the same command continues" in capfd.readouterr().out


def test_pieces_go_on_and_those_that_failed_come_last(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"headline": 1, "transformers": 124}

    def launch(command: list[str], environment: dict[str, str], limit: float) -> int:
        bench.ran.append(command)
        return codes.get(command[2], 0)

    monkeypatch.setattr(bench.gpu, "launch", launch)
    assert call(bench, "--dry", work=tmp_path) == 1
    assert call(bench, "--dry", work=tmp_path) == 1
    assert [command[2] for command in bench.ran] == ["transformers", "headline"]
    assert call(bench, "--dry", "transformers", work=tmp_path) == bench.gpu.GOES_ON
    codes.clear()
    assert call(bench, "--dry", work=tmp_path) == 0
    assert call(bench, "--dry", work=tmp_path) == 0
    assert not bench.ran


TESTS = """
import pytest
def test_it_passes(): pass
def test_it_fails(): assert "a" == "b"
@pytest.mark.skip(reason="needs two | GPUs")
def test_it_is_skipped(): pass
@pytest.fixture
def ended(): yield; raise ValueError("never ends")
def test_it_fails_at_its_end(ended): pass
"""


def test_the_tests_outcomes_are_a_result_whatever_they_are(bench: SimpleNamespace, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text("import no_such_package")
    (tmp_path / "pytest.ini").touch()
    options = bench.gpu.OPTIONS
    assert pytest.main([*options, "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]) == 1
    written = result(bench, "gpu-tests")
    assert written["configuration"] == {"passed": 1, "failed": 3, "skipped": 1}
    table = {row["test"].rpartition("::")[2]: (row["outcome"], row["message"]) for row in written["table"]}
    assert table["test_it_passes"] == ("passed", "")
    assert table["test_it_fails"] == ("failed", "AssertionError: assert 'a' == 'b'")
    assert table["test_it_is_skipped"] == ("skipped", "needs two \\| GPUs")
    assert table["test_it_fails_at_its_end"] == ("failed", "ValueError: never ends")
    assert table["test_none.py"][0] == "failed" and "no_such_package" in str(written["raw"])
    assert capfd.readouterr().out.endswith("ValueError: never ends |\n")


def test_all_missing_packages_are_named_before_any_work(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name in ("timm", "simplejpeg", "transformers"):
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    names = bench.gpu.missing(("transformers",))
    assert [name.split(">")[0] for name in names] == ["timm", "simplejpeg", "transformers"]


def test_without_a_gpu_it_says_so(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "headline", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.gpu.main()


def test_a_piece_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    gpu = runpy.run_path(str(FOLDER / "gpu.py"))
    began = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert gpu["launch"](began, {}, 0.5) == gpu["TOO_LONG"]


def test_what_is_counted_beforehand_is_of_the_cells_that_are_measured() -> None:
    """`python benchmarks/gpu_steps.py --predict` makes the file anew."""
    known = [entry["config"] for entry in json.loads((FOLDER / "results" / "gpu-predicted.json").read_text())["raw"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import gpu_steps

        for cell in (cell for cells in gpu_steps.CELLS.values() for cell in cells):
            assert gpu_steps.described(cell.config) in known, cell
