"""The command line: what it accepts and what it says."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import leanmim
from leanmim.cli import COMMANDS, main
from leanmim.config import Knn, Pretrain, Probe
from leanmim.recipes import RECIPES
from tests.config.docstrings import docstrings
from tests.runs import Refused, arguments, labelled

SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that the commands were called with, instead of calling them."""
    found: list[Any] = []
    for place in ("leanmim.train.pretrain.pretrain", "leanmim.evaluators.knn.knn", "leanmim.evaluators.probe.probe"):
        monkeypatch.setattr(place, lambda config: found.append(config) or iter(()))
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_subcommand_with_its_values_as_defaults(name: str, captured: list[Any]) -> None:
    main(["pretrain", name, "--data", "photos", "--out", "run"])
    assert captured == [replace(RECIPES[name], data="photos", out="run")]


def test_every_kind_of_option_arrives(captured: list[Any]) -> None:
    config = replace(
        RECIPES["simmim"],
        data="a folder/with spaces",
        out="run",
        model=SWIN,
        model_kwargs={"patch_size": 8, "class_token": False, "init_values": 0.5, "global_pool": "avg"},
        init="weights.safetensors",
        input_size=(64, 96),
        channels=1,
        mean=(0.5,),
        std=(0.25,),
        betas=(0.8, 0.9),
        blr=1e-3,
        warmup_epochs=2.5,
        compile=True,
        overwrite=True,
        knn_data="labelled",
        workers=-1,
    )
    main(arguments(config))
    assert captured == [config]


@pytest.mark.parametrize(
    ("words", "compiled", "last"),
    [
        ("--compile --seed 1 --no-channels-last", True, False),
        ("--no-compile --channels_last", False, True),
        ("--compile auto --channels-last False", "auto", False),
    ],
)
def test_switches_that_may_be_auto(captured: list[Any], words: str, compiled: Any, last: Any) -> None:
    main(["pretrain", "mae", "--data", "d", "--out", "o", *words.split()])
    assert (captured[0].compile, captured[0].channels_last) == (compiled, last)


def test_hyphens_and_underscores_are_both_accepted(captured: list[Any]) -> None:
    for options in (["--batch-size", "7", "--input-size", "64"], ["--batch_size", "7", "--input_size", "64"]):
        main(["pretrain", "mae", "--data", "d", "--out", "o", *options])
        main(["knn", "r", "--data", "d", *options])
    assert captured[:2] == captured[2:]
    assert captured[1] == Knn(run="r", data="d", batch_size=7, input_size=(64,))


def test_options_of_the_probe(captured: list[Any]) -> None:
    main(["probe", "r", "--data", "d", "--solver", "fast", "--c", "0.5", "--baselines"])
    assert captured == [Probe(run="r", data="d", solver="fast", c=0.5, baselines=True)]


# Help


def words(text: str) -> str:
    """Text without the layout that the terminal's width gave it: lines, which may end within a long word, and frames of groups."""
    return "".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    "line", [*([name] for name in COMMANDS if name != "pretrain"), *(["pretrain", r] for r in RECIPES)]
)
def test_help_of_a_command_names_and_explains_every_field(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as end:
        main([*line, "--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    kind = COMMANDS[line[0]].config
    for name, text in docstrings(kind).items():
        positional = name in ("run", "runs", "recipes", "repo", "start", "images")
        assert positional or re.search(rf"--(no-)?{name.replace('_', '-')}\b", out), name
        assert words(text) in words(out), name
    assert out.count("(default:") >= len(fields(kind)) - out.count("(required)") - 1  # an empty default may go unsaid


def test_help_of_pretrain_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    for name, row in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(row.help)}$", out, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == leanmim.__version__


def test_the_completion_of_a_shell(capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert not end.value.code
    assert "leanmim" in capsys.readouterr().out
    assert refused(["--print-completion", "csh"]) == (
        "leanmim: --print-completion takes the name of a shell: bash or zsh\n"
    )


def test_help_does_not_wait_for_torch() -> None:
    code = """
import atexit, sys
import leanmim.cli
atexit.register(lambda: print('torch' in sys.modules, 'timm' in sys.modules))
leanmim.cli.main(['--help'])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_python_m_leanmim() -> None:
    done = subprocess.run([sys.executable, "-m", "leanmim", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "pretrain" in done.stdout


# A whole day's work


@pytest.mark.results
def test_from_photos_to_report(tiny: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = Path(tiny.out), labelled(tmp_path / "labelled")
    here = [str(run)]
    there = [*here, "--data", str(data), "--device", "cpu", "--workers", "0"]

    said: list[str] = []

    def say(*words: str) -> list[str]:
        main(list(words))
        out, err = capsys.readouterr()
        assert not err or words[0] == "export"
        said.append(err)
        return out.splitlines()

    lines = say(*arguments(tiny))
    assert lines[0].startswith("mae: vit_tiny_patch16_224, ")
    assert "16 images in" in lines[1]
    assert lines[1].endswith("; 8 steps in 2 epochs; warm-up 0.1 epochs")
    assert lines[2].startswith("epochs 0 to 2: 32 x 32 px, 4 steps each; effective batch 4 = 4 x accum 1 x 1 processes")
    assert lines[3].startswith("predicted: ")
    assert lines[-1].startswith("done: encoder in ")
    assert re.search(r"step 8/8  epoch 2.0  loss \d\.\d{4} \d+ images/s data wait \d+%", lines[-2])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 9))

    again = say(*arguments(tiny))  # a finished run: nothing left to do
    assert any(line.startswith("finished after step 8") for line in again)
    assert (run / "metrics.jsonl").read_text() == "".join(json.dumps(line) + "\n" for line in metrics)

    shown = say("knn", *there, "--baselines")
    accuracy = r"\d+\.\d % \(95 % interval \d+\.\d to \d+\.\d, 6 images\)"
    assert [re.sub(accuracy, "%", line) for line in shown] == ["pretrained: %", "random: %", "pixels: %"]
    assert shown[2].startswith("pixels: 100.0 %")
    (line,) = say("probe", *there, "--solver", "fast")
    assert re.fullmatch(f"pretrained: {accuracy}", line)
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 4

    (run / "reconstructions.png").unlink()
    assert say("show", *here, "--count", "2") == [str(run / "reconstructions.png")]
    with Image.open(run / "reconstructions.png") as picture:
        picture.load()
    out = tmp_path / "exported"
    assert say("export", *here, "--out", str(out)) == [str(out)]
    assert said[-1].startswith("To load it in Python:\n") and repr(f"local-dir:{out}") in said[-1]
    assert {path.name for path in out.iterdir()} == {"README.md", "model.safetensors", "config.json"}
    assert say("report", str(run)) == [str(run / "report.html")]
    page = (run / "report.html").read_text()
    assert "100.0" in page  # of the pixels

    fresh = say(*arguments(replace(tiny, blr=1e-3, overwrite=True)))
    assert "lr 1.56e-05" in fresh[2]
    assert not any("continuing" in line for line in fresh)
    assert not (run / "evaluations.jsonl").exists()  # they were of the run before


@pytest.mark.parametrize(("name", "continues"), [("pretrain mae --out o", True), ("knn r", False)])
def test_an_interrupt(
    name: str, continues: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    for place in ("leanmim.train.pretrain.pretrain", "leanmim.evaluators.knn.knn"):
        monkeypatch.setattr(place, interrupted)
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--data", "d"])
    assert end.value.code == 130
    err = capsys.readouterr().err
    assert err.startswith("leanmim: interrupted")
    assert ("continues from the last checkpoint" in err) == continues
