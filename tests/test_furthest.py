"""The Triton kernel picks what the loop picks. Without a GPU it runs in Triton's interpreter, and is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leanmim import masking
from leanmim.masking import Grid, Mask, furthest, furthest_kernel, select_all_furthest, select_furthest
from tests.helpers import mask_of, seeded

IN_TWO_WAYS = """
import os
import torch
from leanmim.masking import Grid, Mask, before_any_pick, furthest

child = os.fork()
os.environ["TRITON_INTERPRET"] = str(int(child == 0))
from leanmim.furthest import furthest as kernel, pick_in_a_row

if child == 0:
    for grid, visible, kept in ((Grid(6, 7), 9, 30), (Grid(8, 8), 0, 9), (Grid(1, 1), 0, 1)):
        ids = torch.rand(3, grid.n).argsort(1)
        mask = Mask(ids[:, :visible], ids[:, visible:])
        noise = torch.rand(3, grid.n).mul(4).floor() / 4  # many patches are equal even by noise
        for start in ("visible", "random"):
            nearest = before_any_pick(mask, grid, start)
            assert torch.equal(kernel(nearest, noise, grid.width, kept), furthest(nearest, noise, grid, kept))
else:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(nearest="*fp32", noise="*fp32", picks="*i64", n="i32", width="i32", kept="i32", BLOCK="constexpr")
    source = ASTSource(pick_in_a_row, signature, constexprs={"BLOCK": 256})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    assert os.waitpid(child, 0)[1] == 0
"""


def test_the_kernel_picks_the_same_and_compiles(tmp_path: Path) -> None:
    """In a process of its own: Triton reads whether to interpret when it is imported, and compiles no wrapped function."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", IN_TWO_WAYS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_masks_in_one_loop_are_split_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(4, 6)
    one, other = mask_of(3, grid, 6), mask_of(3, grid, 3, seed=1)
    masks, kept = [one, one, other], [9, 9, 15]
    noises = [torch.rand(3, grid.n, generator=seeded(i)) for i in range(3)]
    calls: list[int] = []
    monkeypatch.setattr(masking, "furthest", lambda *given: (calls.append(given[3]), furthest(*given))[1])
    together = select_all_furthest(masks, grid, kept, noises)
    assert calls == [15]
    for split, mask, count, noise in zip(together, masks, kept, noises, strict=True):
        for got, want in zip(split, select_furthest(mask, grid, count, noise), strict=True):
            assert torch.equal(got, want)


def test_a_kernel_that_cannot_be_compiled_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert furthest_kernel(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no C compiler\nmore")))
    furthest_kernel.cache_clear()
    for _ in range(2):
        assert furthest_kernel(torch.device("cuda")) is None
    furthest_kernel.cache_clear()
    assert capsys.readouterr().err == (
        "leanmim: furthest sampling runs without its Triton kernel, same picks: no C compiler\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_picks_what_a_cpu_picks() -> None:
    grid = Grid(14, 14)
    mask, noise = mask_of(8, grid, 49), torch.rand(8, grid.n, generator=seeded(0))
    assert furthest_kernel(torch.device("cuda")) is not None
    got = select_furthest(Mask(mask.visible.cuda(), mask.masked.cuda()), grid, 49, noise.cuda())
    for there, here in zip(got, select_furthest(mask, grid, 49, noise), strict=True):
        assert torch.equal(there.cpu(), here)
