"""What the command line says of bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leanmim.cli import COMMANDS, main
from leanmim.config import Pretrain
from leanmim.recipes import RECIPES
from tests.runs import Refused, contents, labelled, untrained
from tests.wrong_lines import contents as names
from tests.wrong_lines import judged, prepare, wrong_lines


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrian mae", "there is no command 'pretrian'; did you mean pretrain?"),
        ("qqq", "there is no command 'qqq'; there are: pretrain, pack, stats, finetune, predict, embed, cost, "),
        ("--data d", "give a command before --data"),
        ("", "give a command\n"),
        ("pretrain mea --data d --out o", "there is no recipe 'mea'; did you mean mae?"),
        ("pretrain photos", "there is no recipe 'photos'; there are: mae, simmim, "),
        ("pretrain --data d mae --out o", "give a recipe before --data"),
        ("pretrain", "give a recipe\n"),
        ("cost mea", "there is no recipe 'mea'; did you mean mae?"),
    ],
)
def test_a_wrong_command_or_recipe_names_the_right_one(line: str, said: str, refused: Refused) -> None:
    message = refused(line.split())
    assert message.startswith(f"leanmim: {said}")
    if not line.startswith("cost"):
        possible = RECIPES if line.startswith("pretrain") else COMMANDS
        assert all(f"\n  {name} " in message for name in possible)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("pretrain mae --data d", ["--out", "leanmim pretrain mae --help"]),
        ("pretrain mae --data d --out o --epochs many", ["--epochs", "many", "leanmim pretrain mae --help"]),
        ("pretrain mae --data d --out o --epoch 3", ["--epoch,", "--epochs", "leanmim pretrain mae --help"]),
        ("knn r --data d --kk 3", ["--kk", "leanmim knn --help"]),
        ("pretrain mae --data d --out o --loss l3", ["--loss", "l3", "l1", "l2"]),
        ("pretrain mae --data d --out o --model-kwargs depth", ["--model-kwargs", "pairs"]),
        ("knn r", ["--data", "Labelled folder"]),
        ("show", ["run folder"]),
    ],
)
def test_what_cannot_be_parsed(line: str, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert all(word in err for word in named)
    for cited in re.findall(r"leanmim [\w -]+ --help", err):  # every command that a message cites exists
        with pytest.raises(SystemExit) as end:
            main(cited.split()[1:])
        assert end.value.code == 0, cited
    capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "old", "new"),
    [
        ("pretrain fastmim-p --data d --out o --stage-scales 1 1.25", "--stage-scales", "--phase-scales"),
        ("pretrain fastmim-p --data d --out o --stage_blrs=1", "--stage-blrs", "--phase-blrs"),
        ("show run --block 0", "--block", "--segment"),
        ("cost mae bim --segments 4", "--segments", "RECIPE:segments=VALUE"),
    ],
)
def test_an_option_of_an_earlier_version_names_the_new_one(line: str, old: str, new: str, refused: Refused) -> None:
    assert refused(line.split()) == f"leanmim: {old} is called {new} now\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("knn --data empty", ["'empty' holds no files"]),
        ("knn --data nowhere", ["'nowhere' is no folder", "train/CLASS and val/CLASS"]),
        ("knn --data labelled --k 0", ["--k 0", "at least 1"]),
        ("knn --data labelled --temperature 0", ["--temperature 0", "at least"]),
        ("knn --data labelled --batch-size 0", ["--batch-size 0", "at least 1"]),
        ("knn --data labelled --crop 0", ["--crop 0", "at most 1"]),
        ("knn --data labelled --input-size 32 32 32", ["--input-size", "one number or two"]),
        ("probe --data labelled --input-size 0", ["--input-size 0", "at least 1"]),
        ("probe --data labelled --epochs 0", ["--epochs 0", "at least 1"]),
        ("probe --data labelled --solver fast --c 0", ["--c 0", "at least"]),
        ("show --count 0", ["--count 0", "at least 1"]),
        ("show --images nowhere", ["--images 'nowhere'", "no such file or folder"]),
        ("show --images empty", ["'empty'", "no files"]),
        ("show --out empty", ["'empty' cannot be written", "--out"]),
        ("export --out texts", ["'texts' is not empty", "--overwrite"]),
        ("export --out foreign.pt", ["'foreign.pt' is a file", "--out takes a folder"]),
    ],
)
def test_bad_input_to_the_commands_that_read_a_run(
    line: str, named: list[str], tiny: Pretrain, clutter: Path, refused: Refused
) -> None:
    run = untrained(tiny)
    labelled(clutter / "labelled")
    before = contents(clutter)
    first, *rest = line.split()
    message = refused([first, str(run), *rest])
    assert all(word in message for word in named), message
    assert contents(clutter) == before


def test_a_sample_of_the_wrong_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make trust` runs all of them, each in a process of its own."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines, before = wrong_lines(), names(tmp_path)
    assert len(lines) >= 300
    for line in lines[:: len(lines) // 20]:
        with pytest.raises(SystemExit) as end:
            main(line)
        assert not judged(end.value.code, capsys.readouterr().err, names(tmp_path) - before), line


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("python -m leanmim pretrain mae --help | true; exit ${PIPESTATUS[0]}", 141),
        ("python -m leanmim pretrain mae --help >&-", 0),
        ("COLUMNS=1 python -m leanmim knn --help", 0),
        (
            "unset HOME; LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 python -m leanmim pretrain mae --data 'f\u00fcr \u732b' --out new",
            2,
        ),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the lines are those of a shell")
def test_odd_surroundings(line: str, code: int, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
