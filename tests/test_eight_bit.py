"""AdamW with moments of 8 bits: torchao's own numbers, plain checkpoints, offloaded and stepped in backward."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

import leanmim
from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.errors import Damaged, UserError
from leanmim.offload import Offload
from leanmim.offload_state import StateOffload
from leanmim.run import Run, load, save
from leanmim.step import load_state, update
from leanmim.train.pretrain import pretrain
from tests.helpers import batches_of, equal, in_segments, made, small, state_of
from tests.runs import pretrain_until

CPU = torch.device("cpu")
WIDE = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}  # wide enough for weights of 4,096 numbers


def test_it_computes_as_torchao_does_with_decay_and_rate_of_each_group() -> None:
    config = small(model_kwargs=WIDE, optimizer="adamw8bit")
    _, (optimizer,) = made(config)
    expected: dict[nn.Parameter, Any] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            kinds = (OptimState8bit.zeros(p.shape, signed) if p.numel() >= 4096 and p.numel() % 256 == 0 else
                     torch.zeros_like(p) for signed in (True, False))  # fmt: skip
            expected[p] = (group, p.detach().clone(), torch.tensor(0.0), *kinds)
    for step in range(2):
        torch.manual_seed(step)
        for p in expected:
            p.grad = torch.randn_like(p)
        for p, (group, weight, steps, first, second) in expected.items():
            steps += 1
            lr, decay = torch.tensor(0.01), group["weight_decay"]
            single_param_adam(weight, p.grad, steps, first, second, None, lr, 0.9, 0.95, decay, 1e-8, True, False)
        optimizer.step()
    assert all(torch.equal(p, weight) for p, (_, weight, *_) in expected.items())
    assert {type(own["exp_avg"]) for own in optimizer.state.values()} == {torch.Tensor, OptimState8bit}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05, 0.0}


def test_offloaded_and_in_backward_it_is_the_same_and_a_checkpoint_continues_it(tmp_path: Path) -> None:
    config = small(model_kwargs=WIDE, optimizer="adamw8bit")
    model, optimizers = made(config)
    other, others = made(config)
    offload = StateOffload(others, CPU)
    for step in range(2):
        update(model, optimizers, batches_of(config, step, 1))
        update(other, others, batches_of(config, step, 1), in_backward=True)
    offload.settle()
    assert equal(state_of(model, optimizers), state_of(other, others))

    saved = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    save(tmp_path / "last.pt", saved)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["optimizers"]
    assert {type(value) for own in state[0]["state"].values() for value in own.values()} == {torch.Tensor}
    third, thirds = made(config)
    third.load_state_dict(model.state_dict())
    load_state(thirds, state)
    assert equal(thirds[0].state_dict()["state"], optimizers[0].state_dict()["state"])
    thirds[0].param_groups[0]["lr"] = thirds[0].param_groups[1]["lr"] = 0.01
    update(model, optimizers, batches_of(config, 2, 1))
    update(third, thirds, batches_of(config, 2, 1))
    assert equal(state_of(model, optimizers), state_of(third, thirds))
    next(own for own in state[0]["state"].values() if "exp_avg.scale" in own)["exp_avg.scale"][0] = -1
    with pytest.raises(Damaged, match="its optimizer's state does not fit parameter"):
        load_state(thirds, state)


def test_segments_on_the_host_stepped_in_backward_are_the_same_too() -> None:
    config = in_segments(model_kwargs={**WIDE, "depth": 4}, optimizer="adamw8bit")
    model, optimizers = made(config)
    other, others = made(config)
    offload = Offload(other, others, CPU)
    for step in range(2):
        update(model, optimizers, batches_of(config, step, 1))
        update(offload, others, batches_of(config, step, 1), in_backward=True)
    assert equal(state_of(model, optimizers), state_of(other, others))


def test_a_run_with_all_options_continues_bit_for_bit(tiny: Pretrain, tmp_path: Path) -> None:
    ways = {"checkpointing": True, "update_in_backward": True, "offload": True}
    config = replace(tiny, model_kwargs={**WIDE, "depth": 1}, optimizer="adamw8bit", epochs=1, **ways)
    assert not config.changes(replace(config, **dict.fromkeys(ways, False)).to_json())
    assert config.changes(replace(config, optimizer="adamw").to_json())
    whole, halved = (replace(config, out=str(tmp_path / name)) for name in ("whole", "halved"))
    pretrain(whole)
    pretrain_until(halved, 2)
    pretrain(halved)
    one, other = (load(Run(Path(run.out)).last) for run in (whole, halved))
    assert equal(one["model"], other["model"]) and equal(one["optimizers"], other["optimizers"])


def test_moments_take_a_quarter_of_the_memory() -> None:
    wide = small(model_kwargs={**WIDE, "embed_dim": 128, "depth": 1}, decoder_width=128)
    (plain, _), (eight, _) = count(wide), count(replace(wide, optimizer="adamw8bit"))
    assert 0.25 < eight.optimizer_bytes / plain.optimizer_bytes < 0.33
    assert eight.weight_bytes == plain.weight_bytes and eight.gradient_bytes == plain.gradient_bytes


def test_where_it_cannot_be_used_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(leanmim.MAE, optimizer="adamw8bit")
    with pytest.raises(UserError, match=r"leave --channels-last out"):
        replace(config, channels_last=True).check()
    with pytest.raises(UserError, match=r"cannot be resized.*leave --phase-scales out, or give --optimizer adamw"):
        replace(config, phase_scales=(0.5, 1.0), phase_starts=(0.0, 0.5)).check()
    monkeypatch.setitem(sys.modules, "leanmim.eight_bit", None)
    with pytest.raises(UserError, match=r"needs the package torchao .*pip install 'leanmim\[memory\]'"):
        made(small(optimizer="adamw8bit"))
