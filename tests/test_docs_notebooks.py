"""The site's notebooks run, and show what they are kept with."""

import builtins
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from leanmim import planner
from leanmim.comparison import processes
from leanmim.recipes import RECIPES
from tests.comparison.fakes import here

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SHRUNK = {  # with a tiny model and few steps
    r"epochs=\d+": "epochs=1",
    r'"depth": 4': '"depth": 4, "embed_dim": 32, "num_heads": 2',
    r"input_size=64": "input_size=32",
    r"1, 3, 64, 64": "1, 3, 32, 32",
    r"hours=[\d.]+": "hours=0.001, workers=0",
    r'budget="\w+"': 'budget="1epochs"',
    r"vit_small_patch16_224": "vit_tiny_patch16_224",
}


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.results
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place in the repository, cell after cell; models shrunk."""
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "demo" / "photos").mkdir(parents=True)
    shutil.copy(DOCS.parent / "demo" / "demo.py", tmp_path / "demo")
    for name in ("lemur", "macaw", "castle", "coffee")[: 4 if "castle" in path.read_text() else 2]:
        shutil.copy(DOCS.parent / "demo" / "photos" / f"{name}.jpg", tmp_path / "demo" / "photos")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [str(tmp_path / "demo"), *sys.path])
    monkeypatch.setattr(processes, "launch", here)  # trainings of a comparison
    monkeypatch.setattr(planner, "RECIPES", {name: RECIPES[name] for name in ("mae", "bim")})  # of a plan
    shown: list[Any] = []
    monkeypatch.setattr(builtins, "display", shown.append, raising=False)
    variables: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path, "code"):
        code = "".join(cell["source"])
        for full, small in SHRUNK.items():
            code = re.sub(full, small, code)
        exec(compile(code, path.name, "exec"), variables)
    assert (folder / "runs" / path.stem).is_dir()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= len(code)
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    text = path.read_text()
    assert not re.search(r"/(tmp|home|root|work|Users|opt|usr)/|Warning", text)
    assert len(text) < 300_000


def test_the_site_has_each_notebook() -> None:
    site = (DOCS.parent / "mkdocs.yml").read_text()
    pages = runpy.run_path(str(DOCS / "hooks.py"))["notebook"]
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert f"notebooks/{path.stem}.md" in site
        page = pages(path)
        assert page.startswith("# ") and page.count("```python") == len(cells(path, "code"))
        assert "<svg" in page or "<table" in page
