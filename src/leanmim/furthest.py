"""Furthest sampling in one launch: a Triton kernel, with the picks of the loop in `masking`. Imported where there is a GPU."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def pick_in_a_row(nearest, noise, picks, n, width, kept, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program for each image, whose n patches stay in registers; squared distances of whole numbers are exact."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    inside = ids < n
    y, x = ids // width, ids % width
    near = tl.load(nearest + row * n + ids, mask=inside, other=0.0)
    half = tl.load(noise + row * n + ids, mask=inside, other=0.0) * 0.5
    for k in range(kept):
        pick = tl.argmax(tl.where(inside, near + half, -1.0), axis=0)
        down, across = y - pick // width, x - pick % width
        near = tl.minimum(near, (down * down + across * across).to(tl.float32))
        tl.store(picks + row * kept + k, pick.to(tl.int64))


def furthest(
    nearest: Float[Tensor, "b n"], noise: Float[Tensor, "b n"], width: int, kept: int
) -> Int[Tensor, "b {kept}"]:
    """The picks of furthest sampling, in order; arguments as those of `leanmim.masking.furthest`, but for the grid's width."""
    b, n = noise.shape
    picks = torch.empty(b, kept, dtype=torch.int64, device=noise.device)
    block = triton.next_power_of_2(n)
    warps = max(1, min(8, block // 256))
    pick_in_a_row[(b,)](nearest.contiguous(), noise.contiguous(), picks, n, width, kept, BLOCK=block, num_warps=warps)
    return picks
