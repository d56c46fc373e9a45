"""Interrupted, continued, refused: what a file of features and its parts go through."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanmim.config import Pretrain
from leanmim.config.embed import Embed
from leanmim.data import Files
from leanmim.errors import UserError
from leanmim.evaluators import embed_file
from leanmim.evaluators.embed import embed
from leanmim.run import Run, load, save
from tests.data.pictures import write
from tests.helpers import fake_run
from tests.runs import contents

COUNT = 11


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def config(tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    """Three parts: two batches of two images, twice, and three images."""
    monkeypatch.setattr(embed_file, "PART_IMAGES", 5)
    run = fake_run(tiny, Path(tiny.out))
    for i in range(COUNT):
        write(tmp_path / "data" / f"{i:02}.png", seed=i)
    out = str(tmp_path / "out" / "f.npy")
    return Embed(start=run.out, data=str(tmp_path / "data"), out=out, device="cpu", workers=0, batch_size=2)


def killed(config: Embed, name: str) -> None:
    """Embed until the file of this name is written, but for its renaming."""
    renamed = os.replace

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise Killed
        renamed(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", rename)
        embed(config)


def files(config: Embed) -> dict[str, bytes]:
    return contents(Path(config.out).parent)


def spoil(config: Embed, *names: str) -> None:
    for name in names:
        (Path(str(config.data)) / name).write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("out", "name"),
    [
        *(("f.npy", name) for name in ("000000.npz", "000002.npz", "f.npy.json", "f.txt", "f.npy")),
        *(("f.parquet", name) for name in ("000001.npz", "f.parquet")),
    ],
)
def test_killed_and_continued_the_bytes_are_the_same(
    out: str, name: str, config: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    if out.endswith("parquet"):
        pytest.importorskip("pyarrow")
    config = replace(config, out=str(Path(config.out).with_name(out)))
    spoil(config, "04.png")
    killed(config, name)
    assert not Path(config.out).exists()
    read, seen = Files.read, []

    def counted(source: Files, index: int) -> Any:
        seen.append(index)
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", counted)
        embed(config)
    done = {"000000.npz": 0, "000001.npz": 4, "000002.npz": 8}.get(name, COUNT)
    assert seen == list(range(done, COUNT))  # what is left, and nothing twice
    continued = files(config)
    embed(replace(config, overwrite=True))
    whole = files(config)
    assert continued.pop(f"{out}.json") != whole.pop(f"{out}.json")  # --overwrite
    assert continued == whole
    names = {out, f"{out}.skipped.jsonl"} | ({"f.txt"} if out == "f.npy" else set())
    assert whole.keys() == names


def test_killed_after_all_was_written(config: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(embed_file.shutil, "rmtree", never)
        embed(config)
    assert (Path(config.out).parent / "f.npy.parts").is_dir()
    before = Path(config.out).read_bytes()
    embed(config)
    assert Path(config.out).read_bytes() == before
    assert files(config).keys() == {"f.npy", "f.npy.json", "f.txt"}


def test_workers_and_the_size_of_parts_change_no_byte(config: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(config)
    before = files(config)
    monkeypatch.setattr(embed_file, "PART_IMAGES", 2048)
    embed(replace(config, workers=1, overwrite=True))
    after = files(config)
    assert before.pop("f.npy.json") != after.pop("f.npy.json")
    assert before == after


def test_unreadable_files_are_listed_and_left_out(config: Embed, capsys: pytest.CaptureFixture[str]) -> None:
    whole = np.load(embed(config))
    spoil(config, "02.png", "03.png", "10.png")  # a batch as a whole, and the last one
    found = np.load(embed(replace(config, overwrite=True)))
    assert np.allclose(found, np.delete(whole, [2, 3, 10], 0), atol=1e-6)
    out = Path(config.out)
    names = [Path(line).name for line in out.with_suffix(".txt").read_text().splitlines()]
    assert names == [f"{i:02}.png" for i in range(COUNT) if i not in (2, 3, 10)]
    listed = [json.loads(line) for line in Path(f"{out}.skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in listed] == [f"{config.data}/{i}.png" for i in ("02", "03", "10")]
    assert all("UnidentifiedImageError" in line["reason"] for line in listed)
    assert f"3 unreadable images are left out, listed in {out}.skipped.jsonl" in capsys.readouterr().err
    assert json.loads(Path(f"{out}.json").read_text())["shape"] == [8, 32]

    for i in ("02", "03", "10"):
        write(Path(str(config.data)) / f"{i}.png", seed=int(i))
    assert np.array_equal(np.load(embed(replace(config, overwrite=True))), whole)
    assert not Path(f"{out}.skipped.jsonl").exists()

    spoil(config, *(f"{i:02}.png" for i in range(COUNT)))
    with pytest.raises(UserError, match=r"none of the 11 image files can be read; the first: .*00\.png"):
        embed(replace(config, out=str(out.with_name("g.npy"))))
    assert not any("g.npy" in name for name in files(config))


def test_names_that_are_no_text(config: Embed) -> None:
    data = Path(str(config.data))
    (data / "00.png").rename(data / "00\udcfe.png")
    (data / "01\udcff.png").write_bytes(b"no picture")
    out = embed(config)
    assert out.with_suffix(".txt").read_text().splitlines()[0] == f"{data}/00\\udcfe.png"
    (listed,) = map(json.loads, Path(f"{out}.skipped.jsonl").read_text().splitlines())
    assert listed["path"] == f"{data}/01\udcff.png"


def test_a_complete_file_is_left_as_it_is(config: Embed, capsys: pytest.CaptureFixture[str]) -> None:
    before = embed(config).stat().st_mtime_ns
    assert embed(replace(config, workers=1)) == Path(config.out)
    assert "f.npy is complete; --overwrite computes it afresh" in capsys.readouterr().err
    assert Path(config.out).stat().st_mtime_ns == before


@pytest.mark.parametrize("complete", [True, False])
def test_another_configuration_data_or_weights(complete: bool, config: Embed) -> None:
    if complete:
        embed(config)
    else:
        killed(config, "000001.npz")
    refused = "holds features of another configuration:\n  .*{}.*\nChoose another --out, .*--overwrite to start afresh"
    for changes, message in (
        ({"layer": 2}, "layer: None there, 2 now"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 now"),
        ({"dtype": "float16"}, "dtype"),
    ):
        with pytest.raises(UserError, match=refused.format(message)):
            embed(replace(config, **changes))

    run = Run(Path(config.start))
    state = load(run.last)
    trained = {key: value + 0.01 if value.is_floating_point() else value for key, value in state["model"].items()}
    save(run.last, state | {"model": trained, "step": 8})
    with pytest.raises(UserError, match=refused.format("other weights: of .* 7 steps there, of .* 8 steps now")):
        embed(config)
    save(run.last, state)

    extra = write(Path(str(config.data)) / "more.png")
    with pytest.raises(UserError, match=refused.format("other images: 11 there, 12 now")):
        embed(config)
    found = np.load(embed(replace(config, overwrite=True)))
    assert len(found) == 12
    extra.unlink()


def test_files_of_others_are_not_overwritten(config: Embed) -> None:
    out = Path(config.out)
    out.parent.mkdir()
    for name in ("f.npy", "f.txt"):
        (out.parent / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}' is not of `leanmim embed`; choose another --out, or --overwrite"):
            embed(config)
        assert files(config) == {name: b"mine"}
        (out.parent / name).unlink()
    out.mkdir()
    with pytest.raises(UserError, match=r"f.npy' is a folder; give the name of a file"):
        embed(replace(config, overwrite=True))
    out.rmdir()
    (out.parent / "f.npy.parts").mkdir()
    with pytest.raises(UserError, match=r"identity.json' is damaged .*start afresh with --overwrite"):
        embed(config)
    (out.parent / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written .*; choose another"):
        embed(replace(config, out=str(out.parent / "file" / "f.npy")))


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("float16", "features of .*00.png are not finite; .*--dtype float32"),
        ("float32", "damaged: the weight .* is not finite"),
    ],
)
def test_features_that_are_not_finite(dtype: str, remedy: str, config: Embed) -> None:
    run = Run(Path(config.start))
    state = load(run.last)
    large = torch.full((32,), 1e30 if dtype == "float16" else float("nan"))
    torch.save(state | {"model": state["model"] | {"encoder.backbone.norm.bias": large}}, run.last)
    with pytest.raises(UserError, match=remedy):
        embed(replace(config, dtype=dtype))
