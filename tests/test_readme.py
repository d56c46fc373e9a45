"""Every command of leanmim and every piece of Python in the README and on the pages of the site runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim import planner
from leanmim.cli import main
from leanmim.comparison import processes
from leanmim.recipes import RECIPES
from tests.comparison.fakes import here
from tests.formats.hub import Hub
from tests.masked import masked_squares

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
SMALL = (
    "--input-size 32 --model-kwargs patch_size 8 embed_dim 32 depth 2 num_heads 2 --decoder-depth 1 --decoder-width 32 "
    "--decoder-heads 2 --epochs 1 --batch-size 4 --workers 0 --device cpu"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def shell() -> list[str]:
    """Command lines: those of the sh blocks and those in the text."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    return lines + re.findall(r"`((?:leanmim|torchrun) [^`]+)`", README)


def shrunk(line: str) -> str:
    """A command with a tiny model and few steps; the options that it has stay."""
    if "finetune" in line:
        scratch = "--input-size 32 --model-kwargs patch_size 8 embed_dim 32 depth 2 num_heads 2"
        line = f"{line} {scratch if 'scratch' in line else ''} --epochs 1 --batch-size 2 --workers 0 --device cpu"
    elif "pretrain fastmim" in line:
        line = f"{line.replace('pvt_v2_b2', 'pvt_v2_b0')} --input-size 64 --epochs 1 --batch-size 4 --device cpu"
    elif "pretrain bim" in line:
        line = f"{line} {SMALL.replace('depth 2', 'depth 4', 1)}"
    elif "pretrain" in line:
        line = f"{line} {SMALL}"
        if "torchrun" in line or "torch.distributed" in line:
            line = line.replace("--out run", "--out run2")
    line = line.replace("--depth 6", "--depth 2").replace("OWNER", "me")
    if line.startswith("leanmim compare"):
        shrink = "--input-size 32 --model-kwargs patch_size 8 embed_dim 32 depth 2 num_heads 2 --measures knn"
        line = f"{re.sub('--budget [^ ]+', '--budget 1epoch', line)} {shrink} --seeds 1 --device cpu"
        line = line.replace('mae lean "lean:mask-ratio=0.9" fastmim', 'mae "lean:mask-ratio=0.9"')
    if line.startswith("leanmim cost"):
        line = f"{line} --model-kwargs depth 4"
    if line.startswith("leanmim plan"):
        shrink = "--input-size 64 --model-kwargs patch_size 8 embed_dim 32 depth 2 num_heads 2 --workers 0"
        line = f"{line} {shrink} --effective-batch 4 --device cpu"
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's user stands: a folder of photos and a labelled one."""
    return prepared(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same place after the README's first command, in the folder `run`."""
    folder = prepared(tmp_path_factory.mktemp("pages"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(shlex.split(shrunk("leanmim pretrain mae --data photos --out run"))[1:])
    return folder


def prepared(folder: Path) -> Path:
    shutil.copytree(ROOT / "demo" / "photos", folder / "photos")
    for part in ("train", "val"):
        for name in ("cat", "sheep", "macaw"):
            (folder / "labelled" / part / name).mkdir(parents=True)
            shutil.copy(ROOT / "demo" / "photos" / f"{name}.jpg", folder / "labelled" / part / name)
    masked_squares(folder / "segmented", (3, 2))
    return folder


@pytest.mark.results
def test_the_readmes_commands_and_python_run(place: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """In the README's own order; models shrunk, every option of the README kept."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(processes, "launch", here)  # trainings of a comparison
    monkeypatch.setattr(planner, "RECIPES", {name: RECIPES[name] for name in ("mae", "bim")})  # of a plan
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    bin_folder = str(Path(sys.executable).parent)
    environment["PATH"] = bin_folder + os.pathsep + environment["PATH"]
    ran = 0
    for line in shell():
        if line.startswith(("make", "pip install")):
            continue  # tested below, and by whoever runs this
        line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
        line = shrunk(line)
        if line.startswith("leanmim "):  # in this process: to start one takes seconds
            main(shlex.split(line)[1:])
        else:
            done = subprocess.run(line, shell=True, cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 8
    assert hub.private == {"me/NAME": False, "me/OTHER": True}

    for code in blocks("python"):
        code = code.replace("img_size=256", "img_size=64").replace(
            "leanmim.build(leanmim.MAE)", 'leanmim.build(replace(leanmim.MAE, model="vit_tiny_patch16_224"))'
        )
        code = code.replace(
            'replace(leanmim.MAE, data="photos", out="run")',
            'replace(leanmim.MAE, data="photos", out="run3", model_kwargs={"depth": 1}, decoder_depth=1, input_size=(32,),'
            " epochs=1, batch_size=4, workers=0)",
        )
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__", "replace": replace})


CODE = re.compile(r"^```(sh|python)\n(.*?)^```", re.M | re.S)
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if CODE.search(text)])
def test_a_pages_commands_and_python_run(page: str, after_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, after the README's first command."""
    monkeypatch.chdir(after_a_run)
    for language, code in CODE.findall(PAGES[page]):
        if language == "python":
            exec(compile(code, f"{page}.md", "exec"), {"__name__": "__main__"})
            continue
        for line in code.splitlines():
            if line == "pip install .":
                continue
            assert line.startswith("leanmim "), line
            main(shlex.split(shrunk(line))[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in shell():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M), line
    assert "make demo" in README and "make test" in README


@pytest.mark.parametrize("folder", [".", "benchmarks"])
def test_links_lead_somewhere(folder: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / folder / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / folder / target.partition("#")[0]).exists(), target


SUMMARY = {  # what a row is called in the README: the result file, and the row there
    "`mae`": ("pr-mim-cifar10-cpu", "mae"),
    "`fastmim`, 128 px": ("screen-cifar10-cpu", "fastmim"),
    "`pr-mim`": ("pr-mim-cifar10-cpu", "pr-mim-50"),
    "`pr-mim`, 70 % thrown": ("pr-mim-cifar10-cpu", "pr-mim-70"),
    "`bim`": ("bim-cifar10-cpu", "bim-4-gentle"),
}
PR_MIM = {
    "MAE": "mae",
    "50 %, random choice, thrown patches ignored": "pr-mim-50-plain-random",
    "50 %, furthest, thrown patches ignored": "pr-mim-50-plain",
    "50 %, random choice, filled in": "pr-mim-50-random",
    "50 %, furthest, filled in (PR-MIM)": "pr-mim-50",
    "70 %, random choice, thrown patches ignored": "pr-mim-70-plain-random",
    "70 %, furthest, thrown patches ignored": "pr-mim-70-plain",
    "70 %, random choice, filled in": "pr-mim-70-random",
    "70 %, furthest, filled in (PR-MIM)": "pr-mim-70",
}
BIM = {
    "random initialisation": "random initialisation",
    "12 blocks, MAE": "mae",
    "12 blocks, BIM": "bim-4-gentle",
    **{f"{n} blocks, MAE": f"mae-depth-{n}" for n in (3, 6, 9)},
    **{f"{n} blocks, BIM": f"bim-4-gentle, first {n} blocks" for n in (3, 6, 9)},
}
TABLES = {  # result file: what a row is called in benchmarks/README.md, and in the file
    "ablate-cifar10-cpu": {
        "raw pixels": "raw pixels",
        "random initialisation": "random initialisation",
        "SimMIM": "simmim",
        "MAE": "mae",
    },
    "pr-mim-cifar10-cpu": PR_MIM,
    "pr-mim-tinyimagenet28-cpu": PR_MIM,
    "bim-cifar10-cpu": BIM,
    "bim-tinyimagenet28-cpu": BIM,
    "fastmim-tinyimagenet28-cpu": {
        "random initialisation": "random initialisation",
        "pixels, 64 px": "mae",
        "pixels, 32 px": "mae-half",
        "HOG, 64 px": "mae-hog",
        "HOG, 32 px": "mae-hog-half",
        "HOG, 32 px, as much time": "mae-hog-half-time",
        "HOG, 32 to 64 px": "mae-hog-p",
        "HOG, 32 to 64 px, as much time": "mae-hog-p-time",
    },
}


def check(shown: str, text: str, file: str, name: str) -> None:
    """The last two numbers of a row are those of a row of the file, rounded."""
    result = (ROOT / "benchmarks" / "results" / f"{file}.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(shown)} \|.*?([^|]+) \| ([^|]+) \|$", text, re.M)
    (own,) = re.findall(rf"^\| {re.escape(name)} \| [^|]* \| ([^|]+) \| ([^|]+) \|", result, re.M)
    for value, cell in zip(row, own, strict=True):
        assert abs(float(value.split()[0]) - float(cell.split()[0])) <= 0.051, shown


@pytest.mark.parametrize("file", TABLES)
def test_every_measured_number_stands_in_a_result_file(file: str) -> None:
    """The rows of a table are those of the file that it names, rounded."""
    table = BENCHMARKS.split(f"(results/{file}.md)")[1].split("\n\n| ")[1].split("\n\n")[0]
    for shown, name in TABLES[file].items():
        check(shown, "| " + table, file, name)


def test_the_table_beside_mem_tracker_is_that_of_its_file() -> None:
    section = BENCHMARKS.split("\n## Cost, predicted")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ")]
    written = (ROOT / "benchmarks" / "results" / "cost-tools-cpu.md").read_text().splitlines()
    assert shown == [line for line in written if line.startswith("| ")]


def rows_of(file: str) -> list[dict[str, str]]:
    """The table of a result file, a dictionary for each row."""
    text = (ROOT / "benchmarks" / "results" / f"{file}.md").read_text()
    head, _, *rows = [[cell.strip() for cell in line[1:-2].split("|")] for line in re.findall(r"^\|.*\|\s", text, re.M)]
    return [dict(zip(head, row, strict=True)) for row in rows]


def section_of(text: str, heading: str) -> dict[str, list[str]]:
    """The table rows under a heading: what each is called, and its other cells."""
    body = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in re.findall(r"^\| .*", body, re.M)]
    return {name: cells for name, *cells in rows}


def test_the_table_of_ways_to_save_memory_is_that_of_its_file() -> None:
    shown = section_of(BENCHMARKS, "Memory")
    del shown[""]
    sizes = ("base_patch16", "large_patch16", "huge_patch14")
    columns = [(f"vit_{size}", batch) for size in sizes for batch in ("64", "256")]
    found = {(row["way"], row["model"], row["batch"]): row for row in rows_of("memory-rivals-cost")}
    assert shown.keys() == {way for way, *_ in found}
    for way, (flops, *peaks) in shown.items():
        own = [found.get((way, *column), {}) for column in columns]
        assert flops == ", ".join(dict.fromkeys(row["training FLOPs"] for row in own if row)), way
        own_peaks = [f"{row['peak, GiB']} GiB" if way == "mae" else row.get("ratio", "") for row in own]
        assert peaks == own_peaks, way


def test_segmentation_and_detection_are_those_of_their_files() -> None:
    shown = section_of(BENCHMARKS, "Segmentation and detection")
    segmented, detected = rows_of("segment-camvid-cpu"), rows_of("detect-bccd-cpu")
    del shown["pre-trained on"]
    assert list(shown) == ["nothing", "the photos at hand", "Imagenette"]
    assert [row["pre-trained on"] for row in segmented] == ["scratch", "own", "imagenette"]
    assert [*shown.values()] == [[a["mIoU, %"], b["mAP, %"]] for a, b in zip(segmented, detected, strict=True)]


def test_what_was_measured_of_them_is_that_of_its_file() -> None:
    shown = section_of(BENCHMARKS, "Memory, measured")
    del shown[""]
    found = {row["way"]: [row["ratio"], row["time"]] for row in rows_of("memory-rivals-cpu")}
    del found["mae"]
    assert shown == found


def test_what_lean_costs_is_that_of_its_file() -> None:
    shown = section_of(BENCHMARKS, "Recipes on photos")
    for row in rows_of("lean-cost"):
        size = {"base": "B", "small": "S"}[row["model"].split("_")[1]]
        name = "MAE at 224 px, 8 x 512" if row["recipe"] == "mae" else f"`{row['recipe']}`"
        flops, _, peak, _ = shown[f"ViT-{size}, {name}"]
        assert peak == row["peak, GiB"] and abs(float(flops) - float(row["training GFLOP an image"])) <= 0.051, row


@pytest.mark.parametrize(
    ("shown", "file", "recipe"),
    [
        ("`pr-mim`", "pr-mim-cost", "pr-mim 50%"),
        ("`pr-mim`, 70 % thrown", "pr-mim-cost", "pr-mim 70%"),
        ("`bim`", "bim-cost", "bim"),
        ("`bim`, one segment on the GPU", "bim-cost", "bim, offloaded"),
    ],
)
def test_the_summarys_costs_stand_in_a_result_file(shown: str, file: str, recipe: str) -> None:
    (row,) = [row for row in rows_of(file) if (row["model"], row["recipe"]) == ("vit_base_patch16", recipe)]
    columns = ("training", "saved", "peak") if file == "pr-mim-cost" else ("training FLOPs", "saved", "peak")
    ratios = [1 + float(row[key][:-1]) / 100 if "%" in row[key] else float(row[key]) for key in columns]
    assert [float(cell) for cell in section_of(README, "Measured")[shown][1:4]] == pytest.approx(ratios, abs=0.0056)


@pytest.mark.parametrize("shown", SUMMARY)
def test_the_summary_stands_in_a_result_file(shown: str) -> None:
    check(shown, README.split("## Measured")[1].split("\n## ")[0], *SUMMARY[shown])


def test_photos_are_listed_with_their_licences() -> None:
    photos = sorted((ROOT / "demo" / "photos").glob("*.jpg"))
    assert len(photos) >= 8
    assert sum(photo.stat().st_size for photo in photos) < 2_000_000
    rows = [
        line for line in (ROOT / "demo" / "photos" / "SOURCES.md").read_text().splitlines() if line.startswith("| ")
    ]
    for photo in photos:
        (row,) = [row for row in rows if row.startswith(f"| {photo.name} |")]
        assert re.search(r"CC0|[Pp]ublic domain", row)
