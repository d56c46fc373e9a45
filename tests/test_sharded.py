"""A model shared out among processes trains as one that each has as a whole, and its checkpoints are anybody's."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import leanmim
from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.data import Normalise, centre_crop, labelled_pair
from leanmim.errors import UserError
from leanmim.evaluators.features import extract, raw_pixels
from leanmim.placement import place
from leanmim.processes import ALONE, processes
from leanmim.recipes import SIMMIM
from leanmim.run import Run, load
from leanmim.sharded import Sharded
from leanmim.step import load_state, update
from tests.forks import FORKS, finish
from tests.helpers import SWIN, equal, images_of, in_segments, made, small, three_classes
from tests.process_faults import Fault, together
from tests.runs import Refused, arguments, lines

STEPS = 3
ONES = {
    "a ViT, clipped, with checkpoints": small(clip_grad=0.05, checkpointing=True),
    "in segments, of masks that grow": in_segments(masking="token", batch_size=2),
    "Swin": small(SIMMIM, (SWIN[0], SWIN[1] | {"depths": [1, 1, 1, 1]}), input_size=(64,)),
}


def trained(config: Pretrain, rank: int, shared: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[dict]]:
    """Losses, weights and the optimizers' state after some steps of two processes."""
    model, optimizers = made(config, rate=1e-3)
    with processes("cpu", 1.0) as (process, device):
        placement = place(model, optimizers, replace(config, shard=shared), device, process)
        found = []
        for step in range(STEPS):
            images = [images_of(config, seed=100 * step + 10 * rank + micro) for micro in range(2)]
            seeds = [100 * step + 10 * rank + micro for micro in range(2)]
            found.append(process.mean(update(placement.losses, optimizers, images, 2, config.clip_grad, seeds)))
        if isinstance(placement, Sharded):
            assert 2 * sum(p.to_local().numel() for p in model.parameters()) < 1.2 * sum(
                p.numel() for p in model.parameters()
            )
            model = placement.gather()
    return torch.stack(found), model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]


def compare(rank: int, port: int, labelled: str) -> None:
    """In one of two processes: `ONES`, as a whole and shared out; features of all by one, and by both."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.set_num_threads(1)
    start = []
    for config in ONES.values():
        (one, whole, states), (other, shared, gathered) = (trained(config, rank, shared) for shared in (False, True))
        start = start or states
        assert torch.allclose(one, other, rtol=1e-5), (one, other)
        assert whole.keys() == shared.keys()
        assert all(torch.allclose(whole[key], shared[key], atol=1e-4) for key in whole)
        for mine, theirs in zip(states, gathered, strict=True):
            for key, moments in mine[
                "state"
            ].items():  # of Adam the weights do not tell whether gradients were summed or averaged
                off = moments["exp_avg"] - theirs["state"][key]["exp_avg"]
                assert off.norm() <= 1e-3 * moments["exp_avg"].norm() + 1e-7
    model, optimizers = made(config := ONES["a ViT, clipped, with checkpoints"])
    with processes("cpu", 1.0) as (process, device):
        placement = Sharded(model, optimizers, config, device, process)
        load_state(optimizers, start)  # of a run without --shard
        placement.gather()
        assert all(
            equal(one.state_dict()["state"], other["state"]) for one, other in zip(optimizers, start, strict=True)
        )
    sets = labelled_pair(labelled, 3, centre_crop((8, 8)))
    with processes("cpu", 1.0) as (process, device):
        for batch in (1, 2, 3):  # of three images
            alone, both = (extract(raw_pixels, sets[0], Normalise([0.5] * 3, [0.5] * 3, device), batch, 0, process=among)
                           for among in (ALONE, process))  # fmt: skip
            assert torch.equal(alone.x, both.x) and torch.equal(alone.y, both.y)


def test_the_numbers_are_those_of_whole_models(tmp_path: Path) -> None:
    """Block-wise and end to end: losses, weights, moments."""
    labelled = three_classes(tmp_path / "labelled")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [FORKS.Process(target=compare, args=(rank, store.port, labelled)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]


def folders(run: Run) -> set[str]:
    return {path.name for path in run.last.parent.glob("*.shards")}


def test_killed_while_it_writes_continued_and_gone_on_with_by_one_process_and_by_four(
    tiny: Pretrain, tmp_path: Path
) -> None:
    config = replace(tiny, blr=0.01, checkpoint_minutes=0.0, knn_data=three_classes(tmp_path / "labelled"), knn_every=1)
    shared, run = replace(config, shard=True), Run(Path(config.out))
    killed = together(tmp_path, arguments(shared), faults=[Fault("killed_in_a_checkpoint", 1, 0)])
    assert killed.codes[0] == 2 and "rank 1 of 2 processes" in killed.texts[0]
    assert load(run.last)["step"] == 1 and len(folders(run)) == 2  # one is of the writer that was killed
    done = together(tmp_path, arguments(shared))
    assert done.codes == [0, 0], done.texts
    assert "continuing after step 1" in done.texts[0]
    assert folders(run) == {"step-3.shards", "step-4.shards"}
    assert [line["step"] for line in lines(config) if "lr" in line] == [1, 2, 3, 4]
    assert "knn" in lines(config)[-1]

    # one process reads it, as the run has done when it exported, and goes on
    assert leanmim.load_backbone(config.out)[0](torch.randn(1, 3, 32, 32)).shape == (1, 32)
    # damage is found, and the one before it taken
    file = run.last.parent / "step-4.shards" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"the checksum of step-4.shards/__1_0.distcp is wrong.*or use the one before"):
        load(run.last)
    said = finish(arguments(replace(config, epochs=3)), tmp_path / "alone.txt")
    assert "continuing after step 3" in said and "will not be bit for bit" in said
    assert load(run.last)["step"] == 6 and not folders(run)
    four = together(tmp_path, arguments(replace(shared, epochs=4)), 4)
    assert four.codes == [0] * 4, four.texts
    assert "continuing after step 6" in four.texts[0] and load(run.last)["step"] == 8


def test_what_does_not_go_with_it(tiny: Pretrain, refused: Refused) -> None:
    shared = replace(tiny, shard=True)
    assert "this is the only one; start several (torchrun" in refused(arguments(shared))
    assert not Path(tiny.out).exists()
    for option in ("compile", "channels_last"):
        with pytest.raises(UserError, match=f"--shard and --{option.replace('_', '-')} do not go together"):
            replace(shared, **{option: True}).check()


def test_each_process_is_counted_with_its_share() -> None:
    whole, _ = count(small())
    share = whole.shared(4)
    assert share.weight_bytes == pytest.approx(whole.weight_bytes / 4, abs=1)
    assert share.peak_bytes == whole.peak_bytes - (whole.weight_bytes - share.weight_bytes) - (
        whole.optimizer_bytes - share.optimizer_bytes
    )
