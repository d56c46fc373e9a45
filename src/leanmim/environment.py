"""Versions and hardware, for the record."""

import platform
import sys
from datetime import datetime, timezone
from typing import Any

import numpy
import PIL
import timm
import torch
import torchvision

from leanmim.device import cpus, device_name
from leanmim.version import __version__


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What environment.json holds."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "leanmim": __version__,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, timm, numpy, PIL)},
        "platform": platform.platform(),
        "device": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cpus": cpus(),
        "command": sys.argv,
    }
