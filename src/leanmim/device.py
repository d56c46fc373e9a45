"""What the machine offers."""

import contextlib
import math
import os
import resource
import sys
from pathlib import Path

import torch

from leanmim.errors import UserError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables from which torch's allocator takes its settings: the second one is the name until torch 2.8."""


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install a driver")
        set_up_cuda()
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no MPS device; use --device cpu")
    return torch.device(name)


def set_up_cuda() -> None:
    """What all that runs on CUDA has in common, before torch's allocator begins.

    Memory in segments that can grow: else sizes that change, as those of segments and phases do, leave gaps, and a run
    needs more than was predicted. What the user has set stays. Matrix products that are left in float32 go by TensorFloat-32
    where the GPU has it, as cuDNN's convolutions do in torch by default.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ |= dict.fromkeys(ALLOCATOR[:2], "expandable_segments:True")
    torch.set_float32_matmul_precision("high")


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu, mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, or None for float32."""
    if name == "auto":  # nothing was measured
        name = "bf16" if device.type == "cuda" and bf16_in_hardware(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def bf16_in_hardware(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself. Where software must, it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def threads_given() -> bool:
    """Whether the environment says how many threads to compute with, as torchrun's does."""
    return "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ


def cpus() -> int:
    """CPU cores that this process may use: a container or a job may have fewer than the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    share, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return allowed if share == "max" else max(1, min(allowed, math.ceil(int(share) / int(period))))


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # no Linux
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
