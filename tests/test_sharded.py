"""A model shared out among processes trains as one that each has as a whole, and its checkpoints are anybody's."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import leanmim
from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.placement import place
from leanmim.processes import processes
from leanmim.recipes import SIMMIM
from leanmim.run import Run, load
from leanmim.shards import Reader
from leanmim.sharded import Sharded, blocks_of
from leanmim.step import update
from leanmim.train.training import at_next_size
from tests.forks import FORKS
from tests.helpers import SWIN, images_of, in_segments, made, small, three_classes
from tests.process_faults import Fault, together
from tests.runs import Refused, arguments, lines, weights

STEPS = 3
ONES = {
    "a ViT, clipped": small(clip_grad=0.05),
    "in segments, of masks that grow": in_segments(masking="token", batch_size=2),
    "Swin": small(SIMMIM, SWIN, input_size=(64,)),
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
            assert 2 * sum(p.to_local().numel() for p in model.parameters()) < 1.2 * sum(p.numel() for p in model.parameters())
            model = placement.gather()
        assert placement.whole().__enter__ and all(p.grad is None for p in model.parameters())
    return torch.stack(found), model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]


def compare(rank: int, port: int) -> None:
    """In one of two processes: `ONES`, as a whole and shared out."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.set_num_threads(1)
    for config in ONES.values():
        (one, whole, states), (other, shared, gathered) = (trained(config, rank, shared) for shared in (False, True))
        assert torch.allclose(one, other, rtol=1e-5), (one, other)
        assert whole.keys() == shared.keys()
        assert all(torch.allclose(whole[key], shared[key], atol=1e-4) for key in whole)
        for mine, theirs in zip(states, gathered, strict=True):
            for key, moments in mine["state"].items():
                assert all(torch.allclose(value, theirs["state"][key][name], rtol=1e-2, atol=1e-4) for name, value in moments.items())


def test_the_numbers_are_those_of_whole_models() -> None:
    """Block-wise and end to end: losses, weights, moments."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [FORKS.Process(target=compare, args=(rank, store.port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
