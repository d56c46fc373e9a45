"""What an optimizer step is: which parameters are decayed, and how its state is continued."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import leanmim
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.step import load_state, make_optimizers, parameter_groups
from tests.helpers import equal


def test_weight_decay_spares_biases_norms_tokens_and_tables(tiny: Pretrain) -> None:
    swin = replace(
        leanmim.SIMMIM,
        model="swin_tiny_patch4_window7_224",
        model_kwargs={"embed_dim": 24},
        input_size=(64,),
        data="-",
        out="-",
    )
    for config in (replace(tiny, model_kwargs={**tiny.model_kwargs, "reg_tokens": 2}), swin):
        model = build(config)
        names = {id(p): name for name, p in model.named_parameters()}
        ((decayed, plain),) = parameter_groups(model)
        spared = {names[id(p)] for p in plain["params"]}
        assert plain["weight_decay"] == 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                special = parameter.ndim == 1 or name.split(".")[-1] in (
                    "cls_token", "reg_token", "mask_token", "pos_embed", "relative_position_bias_table",
                )  # fmt: skip
                assert (name in spared) == special, name
        assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


def test_an_optimizer_continues_with_the_state_of_the_same_groups_only(tiny: Pretrain) -> None:
    model = build(tiny)
    (optimizer,) = make_optimizers(model, tiny)
    for loss in model.losses(torch.randn(2, 3, 32, 32)):
        loss.backward()
    optimizer.step()
    state = deepcopy(optimizer.state_dict())
    (fresh,) = make_optimizers(model, tiny)
    load_state([fresh], [state])
    assert equal(fresh.state_dict(), state)

    decayed, plain = state["param_groups"]
    plain["params"] = [decayed["params"].pop(), *plain["params"]]  # as by a rule of weight decay of an earlier version
    with pytest.raises(UserError, match=r"gave weight decay to other parameters.*finish it with that version.*--init"):
        load_state(make_optimizers(model, tiny), [state])
