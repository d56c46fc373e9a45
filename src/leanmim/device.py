"""What the machine offers."""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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


def cores_of_a_process() -> int:
    """Of `cpus`, the share of each process that torchrun has started here."""
    return max(1, cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@cache
def lane(device: torch.device) -> torch.cuda.Stream:
    """A GPU's stream for copies of batches."""
    return torch.cuda.Stream(device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From pinned memory a GPU copies it beside what it is still computing: the host, which is ahead,
    asks for the next batch while the device works on the one before.
    """
    if device.type != "cuda" or x.is_cuda or not x.is_pinned():
        return x.to(device, non_blocking=True)
    work = torch.cuda.current_stream(device)
    with torch.cuda.stream(lane(device)):
        copied = x.to(device, non_blocking=True)
    work.wait_stream(lane(device))
    copied.record_stream(work)  # its memory, which the copying stream has allocated, is not given away before that
    return copied


@contextlib.contextmanager
def deterministic(asked: bool, device: str) -> Iterator[None]:
    """Inside, if asked, torch takes algorithms that give the same bits each time, and refuses operators that have none.

    Raises:
        UserError: an operator of the model has none, or it is too late for this process.
    """
    if not asked:
        yield
        return
    key, sizes = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
    if device != "cpu" and os.environ.get(key) not in sizes:
        if torch.cuda.is_initialized() or key in os.environ:
            raise UserError(f"--deterministic needs {key}={sizes[0]} in the environment before Python first uses a GPU")
        os.environ[key] = sizes[0]
    before, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        what = str(error).partition(" does not have a deterministic")[0]
        raise UserError(f"--deterministic: torch has no deterministic {what}; leave --deterministic out") from error
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = flags


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
