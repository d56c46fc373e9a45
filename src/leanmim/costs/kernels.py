"""What CUDA does in another way than the CPU, for fake tensors on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode


class AsOnCuda(TorchFunctionMode):
    """Lets fake CPU tensors do what CUDA does: its attention kernels, and layer norms in float32 under autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the functions in which the devices differ."""
        kwargs = kwargs or {}
        if func is Tensor.backward:  # what it computes again is to be done as on CUDA, too
            with self:  # off in here, and torch's own way into the engine would turn it off again
                engine, ones = Variable._execution_engine, torch.ones_like(args[0])
                return engine.run_backward(
                    (args[0],), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func is nn.functional.layer_norm and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return attention_on_cuda(*args, **kwargs)
        return func(*args, **kwargs)


def attention_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """The kernel that CUDA would choose: flash in half precision without a mask, else the memory-efficient one.

    On Hopper and Blackwell torch prefers cuDNN's to flash; it keeps the same tensors, and has the same FLOPs.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32:
        width = q.shape[-1]
        if pad := -width % 8:  # its heads take memory for a multiple of 8; their FLOPs are those of the true width
            q, k, v = (nn.functional.pad(x, (0, pad))[..., :width] for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
        if pad := -attn_mask.shape[-1] % 16:  # its rows must be aligned
            attn_mask = nn.functional.pad(attn_mask, (0, pad))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p)[0]


def cuda_workspaces() -> int:
    """Bytes that cuBLAS takes from torch's allocator, 32 MiB on Hopper, a little over 8 MiB elsewhere; once for the thread of
    the forward pass and once for autograd's of the backward pass.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return 2 * (4096 * 8 * 1024 if hopper else 2 * 4096 * 1024 + 8 * 16 * 1024)
