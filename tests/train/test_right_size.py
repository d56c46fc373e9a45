"""What auto stands for, the memory guard, the warning of too few steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import Folder
from leanmim.errors import UserError
from leanmim.processes import ALONE, Process
from leanmim.recipes import BIM, FASTMIM, MAE, PR_MIM, SIMMIM
from leanmim.run import Run
from leanmim.train import right_size
from leanmim.train.data_list import DataList, keep_list
from leanmim.train.pretrain import pretrain
from leanmim.train.right_size import right_sized, split
from tests.helpers import PHOTOS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A measurement that finds 10 images/s, or whatever the test writes into it."""
    found = [10.0]
    monkeypatch.setattr(right_size, "average_throughput", lambda *_: found[0])
    return found


def sized(config: Pretrain, run: Path | None = None, process: Process = ALONE) -> Pretrain:
    return right_sized(config, Run(run or Path(config.out)), Folder(config.data, 3), process, CPU)[0]


@pytest.fixture
def auto(tiny: Pretrain) -> Pretrain:
    chosen = dict.fromkeys((*right_size.CHOSEN, "effective_batch"), "auto")
    return replace(tiny, **chosen)


def test_every_auto_becomes_a_number_that_fits_the_others(auto: Pretrain, speed: list[float]) -> None:
    speed[0] = 100.0
    config = sized(replace(auto, hours=0.5))
    images = len(Folder(PHOTOS, 3))
    assert config.epochs == 3600 * 0.5 * 100 // images
    assert config.batch_size * config.accum == config.effective_batch == min(images, 32)
    assert config.blr * config.effective_batch / 256 == pytest.approx(right_size.peak_rate(config.effective_batch))
    assert (config.decoder_depth, config.decoder_width, config.decoder_heads) == (1, 32, 1)


def test_given_numbers_stay(auto: Pretrain) -> None:
    given = dict(epochs=3, batch_size=2, accum=2, blr=0.5, decoder_depth=2, decoder_width=48, decoder_heads=4)
    config = sized(replace(auto, **given))
    assert {name: getattr(config, name) for name in given} == given
    rate = sized(replace(auto, epochs=3, batch_size=2, accum=2, lr=0.25))
    assert rate.blr * 4 / 256 == 0.25
    assert sized(replace(auto, epochs=3, effective_batch=6)).effective_batch == 6


def test_more_images_a_step_than_there_are(auto: Pretrain) -> None:
    with pytest.raises(
        UserError, match=r"--effective-batch 256 is more than the 16 images in .*give --effective-batch 16"
    ):
        sized(replace(auto, epochs=3, effective_batch=256))


def test_learning_rate_twice(auto: Pretrain) -> None:
    with pytest.raises(UserError, match="--lr and --blr are two ways"):
        replace(auto, lr=0.1, blr=0.1).check()


@pytest.mark.parametrize(
    ("recipe", "model", "shape"),
    [
        (MAE, "vit_base_patch16_224", (8, 512, 16)),
        (MAE, "vit_small_patch16_224", (2, 384, 12)),
        (MAE, "vit_tiny_patch16_224", (1, 192, 6)),
        (PR_MIM, "vit_tiny_patch16_224", (1, 192, 6)),
        (BIM, "vit_base_patch16_224", (1, 512, 16)),
        (BIM, "vit_tiny_patch16_224", (1, 192, 6)),
        (FASTMIM, "vit_base_patch16_224", (1, 256, 8)),
        (FASTMIM, "vit_tiny_patch16_224", (1, 192, 6)),
        (FASTMIM, "swin_base_patch4_window7_224", (4, 256, 8)),
        (FASTMIM, "convnext_atto", (4, 256, 8)),
    ],
)
def test_decoders_match_the_encoder_and_are_the_published_ones_from_vit_b_on(
    recipe: Pretrain, model: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    config = replace(recipe, data=str(PHOTOS), model=model, epochs=1, batch_size=1, blr=0.0)
    config = sized(config, tmp_path)
    assert (config.decoder_depth, config.decoder_width, config.decoder_heads) == shape


def test_simmims_decoder_is_one_linear_layer_for_every_encoder() -> None:
    assert SIMMIM.decoder_depth == 0


def test_what_was_chosen_is_said_and_stored(auto: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    out = pretrain(replace(auto, hours=0.01))
    said = capsys.readouterr().out
    stored = json.loads((out / "config.json").read_text())
    assert f"auto: decoder 1 x 32; {stored['epochs']} epochs, for 0.01 hours at 10 images/s; batch" in said
    assert f"lr {stored['blr'] * stored['effective_batch'] / 256:.2g}" in said
    assert "only 8 optimizer steps: too few to learn much. Give more --epochs" in said or stored["epochs"] > 0
    assert all(isinstance(stored[name], int | float) for name in right_size.CHOSEN)


def test_a_run_that_is_continued_keeps_its_numbers(auto: Pretrain, speed: list[float]) -> None:
    first = sized(replace(auto, hours=0.02))
    Run(Path(auto.out)).prepare(first, 0)
    speed[0] = 1000.0
    again, notes = right_sized(auto, Run(Path(auto.out)), Folder(auto.data, 3), ALONE, CPU)
    assert replace(again, hours=0.02) == first
    assert notes == [notes[-1]]
    assert notes[0].startswith(f"as this run began: epochs {first.epochs}, batch-size {first.batch_size}")
    assert sized(replace(auto, overwrite=True)).epochs != first.epochs


def test_the_step_stays_the_same_with_more_processes(auto: Pretrain) -> None:
    first = sized(replace(auto, epochs=3, effective_batch=8))
    run = Run(Path(auto.out))
    run.prepare(first, 0)
    keep_list(run, DataList([], [], images=16, processes=1), None, 0)
    run.last.parent.mkdir(exist_ok=True)
    run.last.touch()

    class Two(Process):
        def gather(self, value: object) -> list:
            return [value] * 2

    again = sized(replace(auto, epochs=3), process=Two(0, 2))
    assert replace(again, epochs=3) == first
    own, _ = split(again, Two(0, 2))
    assert own.batch_size * own.accum * 2 == first.effective_batch == 8


def test_too_little_memory_names_the_batch_that_fits(tiny: Pretrain) -> None:
    big = replace(tiny, batch_size=16)
    big = replace(big, memory=f"{count(big)[0].peak_bytes - 1}B")
    with pytest.raises(UserError, match=r"are predicted at the peak, and .* are free.*--memory none") as refused:
        pretrain(big)
    assert not Path(big.out).exists()
    words = str(refused.value).split()
    batch, accum = (int(words[words.index(option) + 1]) for option in ("--batch-size", "--accum"))
    assert batch * accum == 16
    assert batch < 16
    pretrain(replace(big, batch_size=batch, accum=accum, epochs=1))
    pretrain(replace(big, memory="none", epochs=1, out=big.out + "2"))


def test_too_little_memory_for_one_image(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="not even one image fits: choose a smaller --model or --input-size"):
        pretrain(replace(tiny, memory="1MB"))
