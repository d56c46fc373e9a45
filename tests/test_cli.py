"""The command line: what it accepts, what it says, and what it leaves alone when the input is wrong."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm import create_model

import leanmim
from leanmim import config as configurations
from leanmim.checkpoint import Run, save, write_json
from leanmim.cli import COMMANDS, main
from leanmim.config import Knn, Pretrain, Probe
from leanmim.mim import build
from leanmim.recipes import RECIPES

SWIN = "swin_tiny_patch4_window7_224"


def command(config: Pretrain) -> list[str]:
    """The command line for a configuration: what differs from its recipe."""
    arguments = ["pretrain", config.recipe, "--data", config.data, "--out", config.out]
    for field in fields(Pretrain):
        value = getattr(config, field.name)
        if field.name in ("recipe", "data", "out") or value == getattr(RECIPES[config.recipe], field.name):
            continue
        option = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            arguments += [option, *(str(part) for pair in value.items() for part in pair)]
        elif isinstance(value, tuple):
            arguments += [option, *map(str, value)]
        else:
            arguments += [option, str(value)]
    return arguments


def untrained(config: Pretrain) -> Path:
    """A run folder of a model before its first step."""
    run = Run(Path(config.out))
    write_json(run.config, config.to_json())
    model = build(config)
    state = dict(
        config=config.to_json(), step=0, mean=[0.5] * 3, std=[0.25] * 3, model=model.state_dict(), optimizers=[]
    )
    save(run.last, state)
    run.metrics.write_text('{"step": 1}\n')
    return run.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def labelled(root: Path, count: int = 3) -> Path:
    """Two colours to tell apart."""
    for part in ("train", "val"):
        for name in ("red", "blue"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (24 + i, 32), name).save(root / part / name / f"{i}.png")
    return root


Refused = Callable[[list[str]], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must end with one message and exit code 2; the message."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("leanmim: ")
        assert err.count("leanmim: ") == 1
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that the commands were called with, instead of calling them."""
    found: list[Any] = []
    for place in ("leanmim.train.pretrain", "leanmim.evaluate.knn.knn", "leanmim.evaluate.probe.probe"):
        monkeypatch.setattr(place, lambda config: found.append(config) or iter(()))
    return found


# Parsing


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
    main(command(config))
    assert captured == [config]


def test_hyphens_and_underscores_are_both_accepted(captured: list[Any]) -> None:
    for options in (["--batch-size", "7", "--input-size", "64"], ["--batch_size", "7", "--input_size", "64"]):
        main(["pretrain", "mae", "--data", "d", "--out", "o", *options])
        main(["knn", "r", "--data", "d", *options])
    assert captured[:2] == captured[2:]
    assert captured[1] == Knn("r", "d", batch_size=7, input_size=(64,))


def test_options_of_the_probe(captured: list[Any]) -> None:
    main(["probe", "r", "--data", "d", "--solver", "fast", "--c", "0.5", "--baselines"])
    assert captured == [Probe("r", "d", solver="fast", c=0.5, baselines=True)]


# Help


def docstrings(kind: type) -> dict[str, str]:
    """Each field's docstring, read from the source."""
    found: dict[str, str] = {}
    for base in reversed([b for b in kind.__mro__ if b is not object]):
        (body,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(body, ast.ClassDef)
        for line, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign):
                assert isinstance(line.target, ast.Name)
                text = following.value if isinstance(following, ast.Expr) else None
                found[line.target.id] = str(text.value) if isinstance(text, ast.Constant) else ""
    return found


def words(text: str) -> str:
    """Text without the layout that the terminal's width gave it."""
    return " ".join(text.split())


@pytest.mark.parametrize("kind", [row.config for row in COMMANDS.values()])
def test_every_field_has_a_docstring(kind: type) -> None:
    found = docstrings(kind)
    assert set(found) == {field.name for field in fields(kind)}
    for name, text in found.items():
        assert text.endswith("."), f"{kind.__name__}.{name}"


def test_every_configuration_belongs_to_a_command() -> None:
    kinds = {
        kind for _, kind in inspect.getmembers(configurations, inspect.isclass) if hasattr(kind, "__dataclass_fields__")
    }
    assert kinds == {row.config for row in COMMANDS.values()}


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
        positional = name in ("run", "runs", "recipes")
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
    main([option])
    out, err = capsys.readouterr()
    assert not err
    for name, row in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(row.help)}$", out, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == leanmim.__version__


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, leanmim.cli; leanmim.cli.main(['--help']); print('torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_python_m_leanmim() -> None:
    done = subprocess.run([sys.executable, "-m", "leanmim", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "pretrain" in done.stdout


# What cannot be parsed


def test_unknown_command(refused: Refused) -> None:
    message = refused(["pretrian", "mae"])
    assert "'pretrian'" in message
    assert all(name in message for name in COMMANDS)


def test_no_command(refused: Refused) -> None:
    assert all(name in refused([]) for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("pretrain", ["mae", "simmim"]),
        ("pretrain meh --data d --out o", ["meh", "mae", "simmim"]),
        ("pretrain mae --data d", ["--out", "--help"]),
        ("pretrain mae --data d --out o --epochs many", ["--epochs", "many"]),
        ("pretrain mae --data d --out o --epoch-count 3", ["--epoch-count", "--help"]),
        ("pretrain mae --data d --out o --masking blocks", ["--masking", "blocks", "drop", "token"]),
        ("pretrain mae --data d --out o --model-kwargs depth", ["--model-kwargs", "pairs"]),
        ("knn r", ["--data", "Labelled folder"]),
        ("show", ["Run folder"]),
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


# Bad input to pretrain: one message, and nothing written


def bad(*named: str, **options: Any) -> Any:
    return pytest.param(options, named, id=" ".join(options) + " " + "-".join(str(v) for v in options.values())[:40])


BAD = [
    bad("'empty'", "no files", "png", data="empty"),
    bad("'texts'", "2 files but no images", "png", data="texts"),
    bad("'nowhere'", "takes a folder of images", data="nowhere"),
    bad("'texts/a.txt' is a file", "takes a folder of images", data="texts/a.txt"),
    bad("--data is needed", data=""),
    bad("'vit_tinny_patch16_224'", "nearest: ", "vit_tiny_patch16_224", model="vit_tinny_patch16_224"),
    bad("nearest: none", "timm.list_models()", model="qqqqqqqq"),
    bad("batch of 17", "16 in", "--batch-size 16 or smaller", batch_size=17),
    bad("batch of 32", "accum 8", "--batch-size 2 or smaller", accum=8),
    bad("--input-size 36 36", "patch of 8 px", "try 32 32", input_size=(36,)),
    bad("--input-size 32 44", "patch of 8 px", "try 32 40", input_size=(32, 44)),
    bad("--input-size takes one number or two", input_size=(32, 32, 32)),
    bad("--input-size 0", "positive", input_size=(0,)),
    bad("--masking drop", "SwinTransformer", "it can do: token", "simmim", model=SWIN, model_kwargs={"embed_dim": 24}),
    bad("ResNet", "--masking drop", "leanmim pretrain fastmim", model="resnet18", model_kwargs={}),
    bad("ResNet", "--masking token", "it can do: pixel", model="resnet18", model_kwargs={}, masking="token"),
    bad("foo", "--model-kwargs", model_kwargs={"foo": 3}),
    bad("num_heads", "cannot be built", model_kwargs={"embed_dim": 33, "num_heads": 2}),
    bad("--mask-unit 12", "patch of 8 px", "try 16", mask_unit=12),
    bad("3 x 3 patches does not divide the grid of 4 x 4", "--mask-unit", mask_unit=24),
    bad("--mask-ratio 0.0 masks 0 of 16 units", "between 0.0625 and 0.9375", mask_ratio=0.0),
    bad("--mask-ratio 0.99 masks 16 of 16 units", "between 0.0625 and 0.9375", mask_ratio=0.99),
    bad("--mask-ratio 1.5", "at most 1", mask_ratio=1.5),
    bad("--mask-ratio nan", "at least 0", mask_ratio=float("nan")),
    bad("--decoder-depth 0", "--masking token", decoder_depth=0),
    bad("--decoder-width 30", "multiple of 4", decoder_width=30),
    bad("--decoder-width 0", "at least 4", decoder_width=0),
    bad("--decoder-heads 0", "at least 1", decoder_heads=0),
    bad("--epochs 0", "at least 1", epochs=0),
    bad("--warmup-epochs 9.0", "2 epochs", warmup_epochs=9.0),
    bad("--crop-scale 0.9 0.2", "low <= high <= 1", crop_scale=(0.9, 0.2)),
    bad("--mean has 2 numbers for 3 channels", "one for each", mean=(0.5, 0.5), std=(0.2, 0.2)),
    bad("--mean and --std together", mean=(0.5, 0.5, 0.5)),
    bad("--mean", "finite", mean=(0.5, float("nan"), 0.5), std=(0.2, 0.2, 0.2)),
    bad("--std", "positive", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.0)),
    bad("'nowhere'", "--init", init="nowhere"),
    bad("'texts/a.jpg.pt'", "damaged or not a checkpoint", init="texts/a.jpg.pt"),
    bad("'foreign.pt'", "not one of leanmim", init="foreign.pt"),
    bad("'foreign.pth'", "does not fit the model", "--model-kwargs", init="foreign.pth"),
    bad("'empty'", "train/CLASS and val/CLASS", knn_data="empty"),
]
if not torch.cuda.is_available():
    BAD.append(bad("--device cuda", "use --device cpu", device="cuda"))


@pytest.fixture
def clutter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what people pass by mistake."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "a.jpg.pt"):
        (tmp_path / "texts" / name).write_text("no picture, no checkpoint")
    weights = create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=8, embed_dim=8, depth=1, num_heads=1
    ).state_dict()
    torch.save(weights, tmp_path / "foreign.pt")
    torch.save(weights, tmp_path / "foreign.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("options", "named"), BAD)
def test_bad_input_to_pretrain(
    options: dict[str, Any], named: tuple[str, ...], tiny: Pretrain, clutter: Path, refused: Refused
) -> None:
    wrong = replace(tiny, **options)
    message = refused(command(wrong))
    assert all(word in message for word in named), message
    assert not Path(tiny.out).exists()

    # nor does --overwrite destroy anything before all is well
    before = contents(untrained(tiny))
    assert refused(command(replace(wrong, overwrite=True))) == message
    assert contents(Path(tiny.out)) == before


# The run folder


def test_a_run_folder_of_another_configuration(tiny: Pretrain, refused: Refused) -> None:
    before = contents(untrained(tiny))
    message = refused(command(replace(tiny, blr=1.0, input_size=(40,))))
    for word in (
        "another configuration",
        "blr: 0.00015 there, 1.0 now",
        "input_size: [32] there, [40] now",
        "--overwrite",
    ):
        assert word in message
    assert "epochs" not in message  # only what differs
    assert contents(Path(tiny.out)) == before


@pytest.mark.parametrize("file", ["holiday.jpg", "config.json"])
def test_a_folder_of_somebody_else(file: str, tiny: Pretrain, refused: Refused) -> None:
    """Also with --overwrite."""
    folder = Path(tiny.out)
    folder.mkdir()
    (folder / file).write_text('{"architecture": "resnet18"}')
    for config in (tiny, replace(tiny, overwrite=True)):
        message = refused(command(config))
        assert repr(tiny.out) in message
        assert "not a run of leanmim; choose another folder" in message
        assert contents(folder) == {file: b'{"architecture": "resnet18"}'}


def test_out_is_a_file(tiny: Pretrain, refused: Refused) -> None:
    Path(tiny.out).write_text("notes")
    assert "is a file; give a folder" in refused(command(tiny))
    assert Path(tiny.out).read_text() == "notes"


def damage(last: Path, how: str) -> None:
    if how == "truncated":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif how == "empty":
        last.write_bytes(b"")
    elif how == "text":
        last.write_text("no checkpoint")
    elif how == "foreign":
        torch.save({"model": {"weight": torch.zeros(3)}}, last)
    else:
        last.unlink()


WRONGS = {
    "truncated": "damaged or not a checkpoint",
    "empty": "damaged or not a checkpoint",
    "text": "damaged or not a checkpoint",
    "foreign": "not one of leanmim",
}


@pytest.mark.parametrize("how", WRONGS)
def test_a_damaged_checkpoint_is_not_continued(how: str, tiny: Pretrain, refused: Refused) -> None:
    folder = untrained(tiny)
    damage(Run(folder).last, how)
    before = contents(folder)
    message = refused(command(tiny))
    assert str(Run(folder).last) in message
    assert WRONGS[how] in message
    assert "--overwrite" in message
    assert contents(folder) == before


@pytest.mark.parametrize("how", [*WRONGS, "missing"])
def test_a_damaged_checkpoint_is_not_read(how: str, tiny: Pretrain, tmp_path: Path, refused: Refused) -> None:
    folder, data = untrained(tiny), labelled(tmp_path / "labelled")
    damage(Run(folder).last, how)
    before = contents(folder)
    for line in (["knn", "--data", str(data)], ["probe", "--data", str(data)], ["show"], ["export"]):
        message = refused([line[0], str(folder), *line[1:]])
        assert str(folder) in message
        assert WRONGS.get(how, "no checkpoint yet; let `leanmim pretrain` run on") in message
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
@pytest.mark.parametrize("line", ["knn --data empty", "probe --data empty", "show", "export", "report"])
def test_not_a_run_folder(line: str, name: str, clutter: Path, refused: Refused) -> None:
    before = contents(clutter)
    message = refused([*line.split(), name])
    assert f"{name!r} is not a run folder of `leanmim pretrain`" in message
    assert contents(clutter) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("knn --data empty", ["'empty' has no folder 'train'", "train/CLASS and val/CLASS"]),
        ("knn --data nowhere", ["'nowhere' has no folder 'train'"]),
        ("knn --data labelled --k 0", ["--k 0", "at least 1"]),
        ("knn --data labelled --temperature 0", ["--temperature 0", "at least"]),
        ("knn --data labelled --batch-size 0", ["--batch-size 0", "at least 1"]),
        ("knn --data labelled --crop 0", ["--crop 0", "at most 1"]),
        ("knn --data labelled --input-size 32 32 32", ["--input-size", "one number or two"]),
        ("probe --data labelled --input-size 0", ["--input-size 0", "positive"]),
        ("probe --data labelled --epochs 0", ["--epochs 0", "at least 1"]),
        ("probe --data labelled --solver fast --c 0", ["--c 0", "at least"]),
        ("probe --data damaged", ["damaged/train/red/0.png cannot be read", "remove it"]),
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
    shutil.copytree(clutter / "labelled", clutter / "damaged")
    (clutter / "damaged/train/red/0.png").write_bytes(b"no picture")
    before = contents(clutter)
    first, *rest = line.split()
    message = refused([first, str(run), *rest])
    assert all(word in message for word in named), message
    assert contents(clutter) == before


# A whole day's work


def test_from_photos_to_report(tiny: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = Path(tiny.out), labelled(tmp_path / "labelled")
    here = [str(run)]
    there = [*here, "--data", str(data), "--device", "cpu", "--workers", "0"]

    def say(*arguments: str) -> list[str]:
        main(list(arguments))
        out, err = capsys.readouterr()
        assert not err
        return out.splitlines()

    lines = say(*command(tiny))
    assert lines[0].startswith("mae: vit_tiny_patch16_224, ")
    assert "16 images in" in lines[1]
    assert lines[1].endswith("; 8 steps in 2 epochs; warm-up 0.1 epochs")
    assert lines[2].startswith("epochs 0 to 2: 32 x 32 px, 4 steps each; effective batch 4 = 4 x accum 1 x 1 processes")
    assert lines[3].startswith("predicted: ")
    assert lines[-1].startswith("done: encoder in ")
    assert re.search(r"step 8/8  epoch 2.0  loss \d\.\d{4} \d+ images/s data wait \d+%", lines[-2])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 9))

    again = say(*command(tiny))  # a finished run: nothing left to do
    assert "continuing after step 8" in again
    assert (run / "metrics.jsonl").read_text() == "".join(json.dumps(line) + "\n" for line in metrics)

    shown = say("knn", *there, "--baselines")
    assert [re.sub(r"\d+\.\d\d %", "%", line) for line in shown] == ["pretrained: %", "random: %", "pixels: %"]
    assert shown[2] == "pixels: 100.00 %"
    (line,) = say("probe", *there, "--solver", "fast")
    assert re.fullmatch(r"pretrained: \d+\.\d\d %", line)
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 4

    (run / "reconstructions.png").unlink()
    assert say("show", *here, "--count", "2") == [str(run / "reconstructions.png")]
    with Image.open(run / "reconstructions.png") as picture:
        picture.load()
    out = tmp_path / "exported"
    assert say("export", *here, "--out", str(out)) == [str(out)]
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json"}
    assert say("report", str(run)) == [str(run / "report.html")]
    page = (run / "report.html").read_text()
    assert "100.0" in page  # of the pixels

    fresh = say(*command(replace(tiny, blr=1e-3, overwrite=True)))
    assert "lr 1.56e-05" in fresh[2]
    assert not any("continuing" in line for line in fresh)
    assert not (run / "evaluations.jsonl").exists()  # they were of the run before


@pytest.fixture
def spoilt(tiny: Pretrain, tmp_path: Path) -> Pretrain:
    """The photos with two broken files among them; every epoch reads all."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny.data, folder)
    whole = (folder / "cat.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "letter.jpg").write_text("Dear Sir or Madam")
    return replace(tiny, data=str(folder), batch_size=6, epochs=1)


def skipped(config: Pretrain) -> Iterator[tuple[str, str]]:
    for line in map(json.loads, Run(Path(config.out)).skipped.read_text().splitlines()):
        yield Path(line["path"]).name, line["reason"]


def test_a_few_broken_files_are_skipped_counted_and_listed(
    spoilt: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(replace(spoilt, max_bad_share=0.5)))
    out, err = capsys.readouterr()
    assert not err
    assert f"2 unreadable files were skipped; they are listed in {Run(Path(spoilt.out)).skipped}" in out
    reasons = dict(skipped(spoilt))
    assert len(list(skipped(spoilt))) == 2
    assert set(reasons) == {"cut.jpg", "letter.jpg"}
    assert "truncated" in reasons["cut.jpg"]
    assert "UnidentifiedImageError" in reasons["letter.jpg"]
    assert (Path(spoilt.out) / "export/timm/model.safetensors").is_file()
    assert "letter.jpg" in (Path(spoilt.out) / "report.html").read_text()


def test_too_many_broken_files_end_the_run(spoilt: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command(replace(spoilt, max_bad_share=0.01)))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("leanmim: ")
    assert "Traceback" not in err
    for word in (
        "of 18 image files cannot be read",
        "--max-bad-share 0.01",
        str(Run(Path(spoilt.out)).skipped),
        "remove",
    ):
        assert word in err
    assert {name for name, _ in skipped(spoilt)} <= {"cut.jpg", "letter.jpg"}


@pytest.mark.parametrize(("name", "continues"), [("pretrain mae --out o", True), ("knn r", False)])
def test_an_interrupt(
    name: str, continues: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    for place in ("leanmim.train.pretrain", "leanmim.evaluate.knn.knn"):
        monkeypatch.setattr(place, interrupted)
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--data", "d"])
    assert end.value.code == 130
    err = capsys.readouterr().err
    assert err.startswith("leanmim: interrupted")
    assert ("continues from the last checkpoint" in err) == continues
