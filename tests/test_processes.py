"""Several processes train as one."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import leanmim
from leanmim.config import Pretrain
from leanmim.data import IMAGENET, Crops, Folder, Normalise, collate, epoch_order, seed_of
from leanmim.factory import build
from leanmim.schedule import learning_rate
from leanmim.step import parameter_groups
from tests.runs import ENVIRONMENT, arguments, command, weights


@pytest.mark.parametrize("accum", [1, 2])
def test_two_processes_average_their_gradients(tiny: Pretrain, accum: int) -> None:
    """Two gloo processes of batch 4 take the step that averages both processes' gradients."""
    config = replace(tiny, epochs=1, accum=accum, blr=0.1, warmup_epochs=0.0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "leanmim", *arguments(config)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"effective batch {8 * accum} = 4 x accum {accum} x 2 processes" in done.stdout

    torch.manual_seed(0)
    model = build(config).train()
    groups = parameter_groups(model)[0]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    data = Crops(Folder(config.data, 3), (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=0)
    normalise = Normalise(*IMAGENET[3], torch.device("cpu"))
    order, steps = epoch_order(16, 0, 0), 2 // accum
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 0.0, 0.1 * 8 * accum / 256)
        optimizer.zero_grad()
        for micro in range(accum):
            for rank in range(2):
                first = ((accum * step + micro) * 2 + rank) * 4
                images, _ = collate([data[0, index] for index in order[first : first + 4].tolist()])
                torch.manual_seed(seed_of(0, rank, step, micro))
                (loss,) = model.losses(normalise(images))
                (loss / accum / 2).backward()
        optimizer.step()
    for name, value in weights(config).items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=2e-6), name

    # one process goes on with it: evaluates, exports, starts from it
    backbone, _, _ = leanmim.load_backbone(config.out)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    alone = subprocess.run(command(config), env=ENVIRONMENT, capture_output=True, text=True)
    assert "continuing after step" in alone.stdout
