"""How every benchmark writes its result: one JSON file with all that is needed to read it, one Markdown table."""

import json
import os
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy
import timm
import torch

RESULTS = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
"""Where results are written; the environment variable RESULTS names another folder."""


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def commit() -> str:
    """The version of this code; empty where there is no git, or only a copy of the files."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def hardware() -> dict[str, Any]:
    """Date, hardware, versions, commit."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without the paths of this machine."""
    return {key: value for key, value in config.items() if key not in ("start", "data", "out")}


def spread(shares: list[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    values = [100 * share for share in shares]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; the columns are the keys of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
    name: str,
    title: str,
    configuration: dict[str, Any],
    rows: list[dict[str, Any]],
    raw: Any,
    note: str = "",
    shown: bool = True,
) -> None:
    """Write results/NAME.json and results/NAME.md, and print the table unless it is not to be ``shown``."""
    where = hardware()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"hardware": where, "configuration": configuration, "table": rows, "raw": raw}, indent=1) + "\n"
    )
    text = "\n\n".join(
        part
        for part in (
            f"# {title}",
            ", ".join(f"{key} {value}" for key, value in where.items() if value),
            "Configuration: " + ", ".join(f"{key} {value}" for key, value in configuration.items()),
            markdown(rows),
            note,
        )
        if part
    )
    (RESULTS / f"{name}.md").write_text(text + "\n")
    if shown:
        print(text, flush=True)
