import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import leanmim
from leanmim.cli import main
from leanmim.config import Pretrain, Stats
from leanmim.config.base import Stored
from leanmim.data import Folder, statistics
from leanmim.data.stats import stats
from leanmim.errors import UserError
from tests.data.pictures import noise
from tests.data.stored import values, write


def test_mean_and_deviation_are_numpys(tmp_path: Path) -> None:
    every = np.stack(write(tmp_path, 5)).astype(np.float64)
    mean, std = statistics(Folder(tmp_path, Stored(5)), Stored(5), seed=0)
    np.testing.assert_allclose(mean, every.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, every.std((0, 2, 3)), rtol=1e-12)


def test_an_image_in_several_bands_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = values(3, 21, 10, "float32")
    np.save(tmp_path / "a.npy", array)
    monkeypatch.setattr("leanmim.data.stats.BAND", 120)  # four rows
    mean, std = statistics(Folder(tmp_path, Stored(3)), Stored(3), seed=0)
    np.testing.assert_allclose(mean, array.mean((1, 2), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(std, array.std((1, 2), dtype=np.float64), rtol=1e-12)


def test_a_constant_channel_has_the_deviation_1(tmp_path: Path) -> None:
    array = np.stack([np.full((7, 9), 273.15), np.zeros((7, 9)), values(1, 7, 9, "float64")[0] * 1e-9])
    np.save(tmp_path / "a.npy", array)
    _, std = statistics(Folder(tmp_path, Stored(3)), Stored(3), seed=0)
    assert std[:2] == [1, 1] and std[2] == pytest.approx(np.float32(array[2]).std(dtype=np.float64))


def test_what_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", 3)
    np.save(tmp_path / "data" / "8.npy", values(5, 16, 40, "float32"))
    np.save(tmp_path / "data" / "9.npy", values(4))
    main(["stats", "--data", str(tmp_path / "data"), "--channels", "5", "--out", str(tmp_path / "s.json")])
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["images"].startswith("4 of 5; 1 more cannot be read: ") and "9.npy" in said["images"]
    assert said["numbers"] == "uint16 (3), float32 (1)"
    assert (said["height"], said["width"]) == ("16 to 20 px", "30 to 40 px")
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["channels"], found["values"], found["images"]) == (5, "stored", 4)
    given, read = (
        Pretrain(data="-", out="-", channels=5, mean=m, std=s)
        for m, s in (options(said["options"]), (found["mean"], found["std"]))
    )
    np.testing.assert_allclose(given.mean, read.mean, rtol=1e-5)
    np.testing.assert_allclose(given.std, read.std, rtol=1e-5)
    from_file = Pretrain(data="-", out="-", stats=str(tmp_path / "s.json")).with_stats()
    assert from_file == Pretrain(
        data="-", out="-", channels=5, values="stored", mean=tuple(found["mean"]), std=tuple(found["std"])
    )


def options(line: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    words = line.split()
    assert words[:5] == ["--channels", "5", "--values", "stored", "--mean"]
    return tuple(map(float, words[5:10])), tuple(map(float, words[11:]))


def test_of_photos_they_are_on_the_scale_0_to_1(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    found = dict(stats(Stats(data=str(tmp_path), out=str(tmp_path / "s.json"))))
    assert found["numbers"] == "uint8 (1)" and "--values 8-bit" in found["options"]
    mean = json.loads((tmp_path / "s.json").read_text())["mean"]
    np.testing.assert_allclose(mean, noise(20, 30).mean((0, 1)) / 255)


def test_a_sample_of_so_many_images(tmp_path: Path) -> None:
    write(tmp_path, 4)
    assert dict(leanmim.stats(data=tmp_path, channels=5, count=3))["images"] == "3 of 4"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"channels": 5, "values": "stored", "mean": "no", "std": [1]}'])
def test_a_file_that_is_none_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match="is no file of `leanmim stats --out`"):
        Pretrain(data="-", out="-", stats=str(tmp_path / "s.json")).with_stats()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"channels": 17}, "at most 16"),
        ({"channels": 5, "values": "8-bit"}, "--values stored"),
        ({"channels": 5, "mean": (1.0,) * 4, "std": (1.0,) * 4}, "4 numbers for 5 channels"),
        ({"channels": 5, "mean": (1.0,) * 5, "std": (0.0,) * 5}, "--std above 0"),
        ({"channels": 1, "mean": (500.0,), "std": (100.0,)}, "between 0 and 1"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3, "stats": "s.json"}, "leave one out"),
        ({"stats": "nowhere.json"}, "is no file of"),
    ],
)
def test_impossible_channels_and_numbers(own: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pretrain(data="-", out="-", **own).with_stats()


def test_stored_values_have_numbers_of_any_size() -> None:
    Pretrain(data="-", out="-", channels=1, values="stored", mean=(-500.0,), std=(1000.0,)).check()
    Pretrain(data="-", out="-", channels=2, mean=(500.0, -3), std=(1000.0, 1)).check()
