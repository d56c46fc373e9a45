"""AdamW with moments of 8 bits in blocks of 256 (arXiv 2110.02861), as torchao computes it.

The moments of a parameter with fewer than 4,096 numbers, or with a number of them that is no multiple of the block, stay in
float32.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from leanmim.in_backward import trained_by

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they have a sign
for _signed in MOMENTS.values():
    OptimState8bit.zeros((256,), _signed)  # its tables are made at first use, which must not be among fake tensors


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's, for plain learning rates and plain checkpoints.

    Its own are compiled for each shape, which takes a CPU minutes and a C++ compiler; there it runs as it is written. A checkpoint
    holds codes and scales of quantised moments as ordinary tensors, so that it is read without torchao.
    """

    def step(self, closure: Any = None) -> Any:
        """See torch.optim.Optimizer."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.as_tensor(rate, dtype=torch.float32)  # as torchao wants it
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            found = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return found

    def moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Zeros as a checkpoint has them."""
        return parts({"step": torch.zeros(()), **self.fresh(parameter)})

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments before the first step."""
        return {name: self._new_buffer(parameter.detach(), signed) for name, signed in MOMENTS.items()}

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer; in ordinary tensors."""
        found = super().state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in found["param_groups"]]
        return {"state": {key: parts(own) for key, own in found["state"].items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        parameters = trained_by(self)
        state = {key: self.quantised(parameters[key], own) for key, own in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})

    def quantised(self, parameter: nn.Parameter, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a parameter, of what a checkpoint has of it."""
        found = {"step": own["step"].clone(), **self.fresh(parameter)}
        for name, tensor in parts(found).items():
            tensor.copy_(own[name])
        return found


def parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ordinary tensors of a parameter's state, by names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, OptimState8bit):
            found |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            found[name] = value
    return found
