"""Run the notebooks in docs/notebooks afresh, and keep what they show: `make notebooks`.

They run in their own folder; what they train lies below it, in `runs`.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def run(path: Path) -> None:
    """Execute a notebook in place; a cell that fails is an error."""
    shutil.rmtree(FOLDER / "runs" / path.stem, ignore_errors=True)
    notebook, began = nbformat.read(path, as_version=4), time.monotonic()
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    path.write_text(nbformat.writes(notebook).replace(f"{FOLDER}/", "") + "\n")  # no places of this machine
    print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def kept(outputs: list[Any]) -> list[Any]:
    """Without bars that have gone; texts in one piece."""
    found: list[Any] = []
    for output in outputs:
        if output.get("data", {}).get("text/html") == "":
            continue
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


if __name__ == "__main__":
    for notebook in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        run(notebook)
