"""Which patches are seen, and which are reconstructed: index sets on the patch grid.

b batch, n patches of the grid, v visible, m masked, k kept, t thrown, u mask units, d any width.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from leanmim.caches import cached
from leanmim.config.base import Start
from leanmim.errors import UserError


class Grid(NamedTuple):
    """The patch grid of an image: one cell per encoder output token, numbered row by row."""

    height: int
    width: int

    @property
    def n(self) -> int:
        """The number of patches."""
        return self.height * self.width


class Mask(NamedTuple):
    """What the encoder sees and what it does not. Every image of a batch has the same counts.

    Masking in pixel space may be finer than the grid. Then every patch counts as masked, and ``hidden`` tells what of
    it is: true for the masked squares of a grid that is a whole number of times finer.
    """

    visible: Int[Tensor, "b v"]
    masked: Int[Tensor, "b m"]  # v + m = n
    hidden: Bool[Tensor, "b y x"] | None = None


class Split(NamedTuple):
    """A partition of the grid: seen, masked and decoded with attention, masked and skipped by attention."""

    visible: Int[Tensor, "b v"]
    kept: Int[Tensor, "b k"]
    thrown: Int[Tensor, "b t"]  # k + t = m


def take(x: Float[Tensor, "b n d"], ids: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Gather the tokens at ``ids``, each image its own."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


@cached
def mask_units(grid: Grid, unit: int, device: torch.device | None = None) -> Int[Tensor, "u p"]:
    """The patches of every ``unit`` x ``unit`` square of the grid, units numbered row by row.

    Raises:
        UserError: the unit does not divide the grid.
    """
    if grid.height % unit or grid.width % unit:
        raise UserError(
            f"a mask unit of {unit} x {unit} patches does not divide the grid of {grid.height} x {grid.width}; "
            "choose --mask-unit so that it divides --input-size, or 0 for one patch"
        )
    ids = torch.arange(grid.n).view(grid.height // unit, unit, grid.width // unit, unit)
    return ids.permute(0, 2, 1, 3).reshape(-1, unit * unit).to(device)


def count_visible(units: int, ratio: float) -> int:
    """How many of the mask units stay visible.

    Raises:
        UserError: the ratio leaves nothing visible or nothing masked.
    """
    masked = math.ceil(units * ratio - 1e-9)  # 10 units at ratio 0.9 are 9, whatever the rounding of 10 * 0.9
    if not 0 < masked < units:
        low, high = math.ceil(1e4 / units) / 1e4, math.floor(1e4 * (units - 1) / units) / 1e4
        between = f"choose it between {low:g} and {high:g}, or " if units > 1 else "choose "
        raise UserError(f"--mask-ratio {ratio} masks {masked} of {units} units; {between}a larger --input-size")
    return units - masked


def random_mask(noise: Float[Tensor, "b u"], grid: Grid, ratio: float, unit: int = 1) -> Mask:
    """Mask the ``ratio`` of units with the highest noise (MAE, section 3: random sampling without replacement).

    Args:
        noise: one number per mask unit; the order of these numbers is the mask.
        grid: the patch grid.
        ratio: share of units to mask, in (0, 1); their count is rounded up, as in SimMIM and MAE.
        unit: side of a mask unit in patches; SimMIM masks units of 32 px.

    Raises:
        UserError: the ratio leaves nothing visible or nothing masked, or the unit does not divide the grid.
    """
    units = mask_units(grid, unit, noise.device)
    order = noise.argsort(dim=1, stable=True)
    ids = units[order].flatten(1)
    visible = count_visible(len(units), ratio) * unit * unit
    return Mask(ids[:, :visible], ids[:, visible:])


def random_fine_mask(noise: Float[Tensor, "b u"], grid: Grid, ratio: float, finer: int) -> Mask:
    """Mask squares that are ``finer`` times finer than the grid, in pixel space (FastMIM, section 3.1)."""
    fine = Grid(grid.height * finer, grid.width * finer)
    masked = random_mask(noise, fine, ratio).masked
    patches = torch.arange(grid.n, device=noise.device).expand(len(noise), -1)
    return Mask(patches[:, :0], patches, squares(masked, fine))


def narrower(mask: Mask, grid: Grid, ratio: float, unit: int = 1) -> Mask:
    """The same mask with more masked, ``ratio`` of all: some of its visible patches, chosen at random (BIM, nested masks).

    What is visible lies in random order, unit by unit; the first ones stay. Of a mask finer than the grid, more squares
    are hidden, by numbers from torch's global generator.

    Raises:
        UserError: as for `random_mask`.
    """
    if mask.hidden is not None:
        finer = mask.hidden.shape[1] // grid.height
        noise = torch.rand(mask.hidden.shape, device=mask.hidden.device) + mask.hidden  # those hidden stay so
        return random_fine_mask(noise.flatten(1), grid, ratio, finer)
    visible = count_visible(len(mask_units(grid, unit)), ratio) * unit * unit
    return Mask(mask.visible[:, :visible], torch.cat([mask.visible[:, visible:], mask.masked], dim=1))


def hidden_squares(mask: Mask, grid: Grid) -> Bool[Tensor, "b y x"]:
    """True for what is masked, on the grid or on the finer one that the mask comes with."""
    if mask.hidden is not None:
        return mask.hidden
    return squares(mask.masked, grid)


def squares(ids: Int[Tensor, "b k"], grid: Grid) -> Bool[Tensor, "b y x"]:
    """True for the patches ``ids`` on the grid."""
    found = torch.zeros(len(ids), grid.n, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, ids, True).view(len(ids), *grid)


def magnify(squares: Shaped[Tensor, "b y x"], size: tuple[int, int]) -> Shaped[Tensor, "b Y X"]:
    """Repeat each square until the grid has ``size`` squares; the old grid divides the new one."""
    down, across = size[0] // squares.shape[1], size[1] // squares.shape[2]
    return squares.repeat_interleave(down, 1).repeat_interleave(across, 2)


def cover(hidden: Bool[Tensor, "b y x"], size: tuple[int, int]) -> Bool[Tensor, "b Y X"]:
    """Which squares of a grid of ``size``, coarser or finer, are hidden as a whole."""
    if hidden.shape[1] <= size[0]:
        return magnify(hidden, size)
    down, across = hidden.shape[1] // size[0], hidden.shape[2] // size[1]
    return hidden.unflatten(2, (size[1], across)).unflatten(1, (size[0], down)).all(4).all(2)


def keep_all(mask: Mask) -> Split:
    """Decode every masked patch: the full method, nothing thrown."""
    return Split(mask.visible, mask.masked, mask.masked[:, :0])


def select_random(mask: Mask, kept: int, noise: Float[Tensor, "b n"]) -> Split:
    """Decode ``kept`` of the masked patches, those with the lowest noise, and throw the others (PR-MIM's baseline)."""
    masked = mask.masked.gather(1, noise.gather(1, mask.masked).argsort(dim=1, stable=True))
    return Split(mask.visible, masked[:, :kept], masked[:, kept:])


@cached
def distances(grid: Grid, device: torch.device | None = None) -> Float[Tensor, "n n"]:
    """Squared Euclidean distances between patches, in patches."""
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    return (places[:, None] - places).square().sum(dim=2).float().to(device)


def select_furthest(mask: Mask, grid: Grid, kept: int, noise: Float[Tensor, "b n"], start: Start = "visible") -> Split:
    """Decode ``kept`` of the masked patches, spread out evenly, and throw the others (PR-MIM's furthest sampling: greedy
    farthest-point sampling).

    Each pick is a masked patch whose nearest chosen patch is the furthest away, so that every thrown one ends up with
    a decoded or visible patch close by.

    Args:
        mask: the patches to choose from.
        grid: the patch grid.
        kept: k, in 1 ... m.
        noise: in [0, 1), one number a patch; of patches equally far away the one with the highest is picked.
        start: what counts as chosen at first. ``visible``: the visible patches; where a mask finer than the grid leaves
            none, the same as ``random``. ``random``: nothing, the first pick is random, visible patches are not looked at.
    """
    return select_all_furthest([mask], grid, [kept], [noise], start)[0]


def select_all_furthest(
    masks: list[Mask], grid: Grid, kept: list[int], noises: list[Float[Tensor, "b n"]], start: Start = "visible"
) -> list[Split]:
    """`select_furthest` of several masks in one loop, since the first picks do not depend on how many follow."""
    nearest: list[Tensor] = []
    for i, mask in enumerate(masks):
        same = i > 0 and mask is masks[i - 1]
        nearest.append(nearest[-1] if same else before_any_pick(mask, grid, start))
    picks = furthest(torch.cat(nearest), torch.cat(noises), grid, max(kept)).split([len(noise) for noise in noises])
    splits = []
    for mask, count, own in zip(masks, kept, picks, strict=True):
        chosen = own[:, :count]
        rest = torch.ones(len(own), grid.n, device=own.device)
        rest.scatter_(1, torch.cat([mask.visible, chosen], dim=1), 0.0)
        thrown = rest.argsort(dim=1, descending=True, stable=True)[:, : mask.masked.shape[1] - count]
        splits.append(Split(mask.visible, chosen, thrown))
    return splits


def before_any_pick(mask: Mask, grid: Grid, start: Start) -> Float[Tensor, "b n"]:
    """The squared distance of every patch to the nearest one that counts as chosen at first; 0 for visible ones."""
    outside = float(grid.height**2 + grid.width**2)  # further than any patch of the grid
    nearest = torch.full((len(mask.visible), grid.n), outside, device=mask.visible.device)
    if start == "random":
        return nearest.scatter_(1, mask.visible, 0.0)
    between = distances(grid, nearest.device)
    for part in mask.visible.split(64, dim=1):  # on a large grid all at once would be a large tensor
        if part.shape[1]:
            nearest = torch.minimum(nearest, between[part].amin(dim=1))
    return nearest


def furthest(
    nearest: Float[Tensor, "b n"], noise: Float[Tensor, "b n"], grid: Grid, kept: int
) -> Int[Tensor, "b {kept}"]:
    """The patches picked by furthest sampling, in order. Where all are chosen, any follow.

    Args:
        nearest: squared distance of each patch to the nearest chosen one, 0 for those chosen.
        noise: in [0, 1), to order patches equally far away.
        grid: the patch grid.
        kept: how many to pick.
    """
    if kernel := furthest_kernel(noise.device):
        return kernel(nearest, noise, grid.width, kept)
    between, half = distances(grid, noise.device), noise / 2
    nearest, score = nearest.clone(), torch.empty_like(nearest)
    picks = torch.empty(kept, len(noise), dtype=torch.int64, device=noise.device)
    for pick in picks:
        # squared distances are whole numbers: noise orders equal ones only, and nothing chosen (0) is picked again
        torch.argmax(torch.add(nearest, half, out=score), dim=1, out=pick)
        torch.minimum(nearest, between.index_select(0, pick), out=nearest)
    return picks.T


@cache
def furthest_kernel(device: torch.device) -> Callable[[Tensor, Tensor, int, int], Tensor] | None:
    """The kernel that does the same in one launch, where there is a GPU and Triton can compile for it."""
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    from leanmim.furthest import furthest

    try:
        furthest(torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device), 1, 1)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:  # no C compiler, an old GPU, a full disk
        reason = str(error).strip().partition("\n")[0]
        print(f"leanmim: furthest sampling runs without its Triton kernel, same picks: {reason}", file=sys.stderr)
        return None
    return furthest
