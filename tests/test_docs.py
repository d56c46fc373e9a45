"""The site: what is made from docstrings is whole, its pictures can be drawn, its pages quote what there is."""

import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import leanmim
from leanmim.cli import COMMANDS
from leanmim.recipes import MAE, RECIPES

DOCS = Path(__file__).parent.parent / "docs"
README = (DOCS.parent / "README.md").read_text()
SITE = (DOCS.parent / "mkdocs.yml").read_text()


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "hooks.py"))


@pytest.fixture(scope="module")
def made(hooks: dict[str, Any]) -> dict[str, str]:
    return hooks["pages"]()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_page_with_its_command_its_options_and_its_tables(made: dict[str, str], name: str) -> None:
    page = made[f"recipes/{name}.md"]
    assert f"leanmim pretrain {name} --data photos" in page and f"recipes/{name}.md" in SITE
    own = {field.name for field in fields(MAE) if getattr(MAE, field.name) != getattr(RECIPES[name], field.name)}
    options = set(re.findall(r"^\| `--([\w-]+)` \|", page, re.M))
    assert options == {option.replace("_", "-") for option in own - {"recipe"}}
    assert re.search(r"^\| .* kNN, %", page, re.M)
    for link in re.findall(r"\]\(\.\./(benchmarks/[^)#]+)", page):
        assert (DOCS.parent / link).exists(), link


def test_a_recipe_without_evidence_says_so(hooks: dict[str, Any]) -> None:
    assert hooks["evidence"](None) == ["Nothing is measured yet."]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_commands_has_every_option(made: dict[str, str], name: str) -> None:
    section = made["commands.md"].split(f"## `leanmim {name}`")[1].split("\n## ")[0]
    options = re.findall(r"^`(?:--)?([\w-]+)`.*\n:   \S", section, re.M)
    expected = [field.name.replace("_", "-") for field in fields(COMMANDS[name].config)]
    assert sorted(option.lower() for option in options) == sorted(expected)


def test_the_page_of_python_has_every_public_name(made: dict[str, str]) -> None:
    missing = {name for name in leanmim.__all__ if f"leanmim.{name}" not in made["api.md"]}
    assert missing == {"__version__"}


def test_pages_quote_sections_that_the_readme_has(made: dict[str, str]) -> None:
    texts = [page.read_text() for page in DOCS.glob("*.md")] + list(made.values())
    quoted = {name for text in texts for name in re.findall(r'^--8<-- "README\.md:([\w-]+)"', text, re.M)}
    begun, ended = (re.findall(rf"--8<-- \[{word}:([\w-]+)\]", README) for word in ("start", "end"))
    assert begun == ended
    assert quoted == set(begun)


def test_no_line_ends_within_an_option(hooks: dict[str, Any]) -> None:
    html = '<a href="--x">a --b</a> <code class="--c">show --knn-data <span>d--e</span></code>'
    marked = html.replace("--knn-data", '<span class="option">--knn-data</span>')
    assert hooks["on_page_content"](html) == marked


def test_pages_show_pictures_that_are_small_and_can_be_drawn() -> None:
    drawing = runpy.run_path(str(DOCS / "draw.py"))
    shown = {name for page in DOCS.glob("*.md") for name in re.findall(r"\(pictures/(\w+)\.webp\)", page.read_text())}
    assert shown == {picture.stem for picture in (DOCS / "pictures").iterdir()}
    for name in shown:
        assert (DOCS / "pictures" / f"{name}.webp").stat().st_size < 150_000
        figure = drawing[name]()
        assert isinstance(figure, Figure) and all(axis.get_title() for axis in figure.axes)
