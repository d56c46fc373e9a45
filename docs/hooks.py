"""What the site has beside the pages of this folder: files of the repository that README.md links to, and pages made from
docstrings, one of all commands, one for each recipe, one of the public names in Python.
"""

import ast
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

import leanmim
from leanmim import recipes
from leanmim.cli import COMMANDS, DESCRIPTIONS
from leanmim.config import Config, Pretrain
from leanmim.config.explained import field_docstrings
from leanmim.config.groups import groups
from leanmim.config.values import described
from leanmim.recipes import MAE, RECIPES, hyphens, words

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
PHOTOS = "Recipes on photos"
EVIDENCE = {  # sections of benchmarks/README.md
    "mae": "The baselines",
    "simmim": "The baselines",
    "fastmim": "FastMIM",
    "fastmim-p": "FastMIM",
    "pr-mim": "PR-MIM",
    "bim": "BIM",
    "lean": PHOTOS,
    "lean-memory": PHOTOS,
}
AS_WORDS = {  # types of Python, on a command line
    "a string or (a string, ...)": "one or more words",
    "(a string, ...)": "words",
    "(a whole number, ...)": "whole numbers",
    "(a number, ...)": "numbers",
    "(a number, a number)": "two numbers",
    "a string": "a word",
    "a dict": "pairs of a name and a value",
    " or None": "",
    "'": "`",
}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?![^<>]*>)")  # not within a tag
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks which files the site has: these come in addition, those of the repository under their path there."""
    from mkdocs.structure.files import File

    for pattern in (
        "*.md",
        "docs/growth.png",
        "docs/reconstructions.jpg",
        "benchmarks/*.md",
        "benchmarks/*.py",
        "examples/*.sh",
        "benchmarks/results/*.png",
    ):
        for path in ROOT.glob(pattern):
            if path != ROOT / "README.md":  # its sections stand in the pages
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs asks for a page's text: a folder of the repository is a page here."""
    return (
        markdown.replace("](results)", "](results/index.md)")
        if page.file.src_uri == "benchmarks/README.md"
        else markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs asks for a page's HTML: no line ends within the name of an option or before a deviation."""
    html = html.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return re.sub(
        r"<code\b.*?</code>", lambda code: OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html, flags=re.S
    )


def pages() -> dict[str, str]:
    """Pages that are made, by their path below this folder."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return {
        "commands.md": commands(),
        "api.md": api(),
        **{f"recipes/{name}.md": recipe(name) for name in RECIPES},
        **{f"notebooks/{path.stem}.md": notebook(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))},
        **{f"benchmarks/results/{path.name}": UNSEARCHED + path.read_text() for path in results},
        "benchmarks/results/index.md": f"{UNSEARCHED}# Results\n\n"
        + "\n".join(f"- [{path.stem}]({path.name})" for path in results),
    }


# recipes


def recipe(name: str) -> str:
    """What the docstring of a recipe says, its options, its tables."""
    tree = ast.parse(Path(recipes.__file__).read_text())
    constant = next(key for key, value in vars(recipes).items() if value is RECIPES[name])
    text = next(after for before, after in zip(tree.body, tree.body[1:], strict=False) if assigns(before, constant))
    assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    said = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", str(text.value.value))
    shared = (ast.get_docstring(tree) or "").split("\n\n")[-1]
    if EVIDENCE.get(name) == PHOTOS:  # whose section says itself how accuracies were measured
        shared = f"{shared.partition(';')[0]}."
    differ = [
        field.name for field in fields(Pretrain) if getattr(RECIPES[name], field.name) != getattr(MAE, field.name)
    ]
    rows = [
        f"| `--{hyphens(own)}` | {value(getattr(MAE, own))} | {value(getattr(RECIPES[name], own))} |"
        for own in differ
        if own != "recipe"
    ]
    options = ["## What differs from `mae`", "", "| option | `mae` | here |", "|---|---|---|", *rows] if rows else []
    return "\n".join([
        f"# `{name}`", "", linked(said), *options, "",
        "All options: [`leanmim pretrain`](../commands.md#leanmim-pretrain).", "",
        "## How its numbers were measured", "", linked(shared), "",
        *evidence(EVIDENCE.get(name)),
    ])  # fmt: skip


def linked(text: str) -> str:
    """A text whose files of results are links, as seen from a folder beside theirs."""
    return re.sub(r"benchmarks/[\w./-]+\.md", r"[file](../\g<0>)", text)


def assigns(statement: ast.stmt, name: str) -> bool:
    """Whether a statement is ``name = ...``."""
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name


def evidence(title: str | None) -> list[str]:
    """A section of benchmarks/README.md, its links as seen from a folder beside it."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    if title is None:
        return ["Nothing is measured yet."]
    body = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [
        f"## Evidence: {title}",
        re.sub(r"\]\((?!http)(#?)", lambda found: f"](../benchmarks/{found[1] and 'README.md#'}", body),
    ]


# notebooks


def notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and what that showed when it was last run."""
    title, *cells = json.loads(path.read_text())["cells"]
    parts = ["".join(title["source"]), f"[Notebook: {path.name}]({path.name})"]
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += map(shown, cell.get("outputs", []))
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """An output of a cell: in the richest of its forms that a page can hold."""
    forms = output.get("data") or {"text/plain": output["text"]}
    for kind in ("text/html", "text/markdown"):
        if kind in forms:
            return f'<div class="shown" markdown="{int(kind == "text/markdown")}">\n\n{"".join(forms[kind])}\n\n</div>'
    return f"``` {{ .text .shown }}\n{''.join(forms['text/plain']).rstrip()}\n```"


# commands


def commands() -> str:
    """All commands and their options."""
    parts = [
        "# Commands and options",
        "An underscore may stand for a hyphen. A switch `--name` has its opposite `--no-name`. Each command prints its page by `--help`.",
        "## Completion in a shell",
        '--8<-- "README.md:completion"',
    ]
    for name, command in COMMANDS.items():
        parts += [f"## `leanmim {name}` {{ #leanmim-{name} }}", f"{plain(command.help[0].upper() + command.help[1:])}."]
        if command.recipes:
            parts.append(f"`leanmim {name} RECIPE` wants the name of a recipe, whose values are the defaults:")
            parts.append("\n".join(f"- [`{own}`](recipes/{own}.md): {DESCRIPTIONS[own]}" for own in command.recipes))
        parts += options(command.config)
    return "\n\n".join(parts) + "\n"


def options(kind: type[Config]) -> list[str]:
    """The options of a command, in the groups of its help page."""
    hints, texts, parts = get_type_hints(kind, include_extras=True), field_docstrings(kind), groups(kind)
    defaults, found = {field.name: field.default for field in fields(kind)}, []
    for group, names in parts.items():
        if len(parts) > 1:
            found.append(f"**{group[0].upper() + group[1:]}**")
        found += [f"{heading(name, hints[name], defaults[name])}\n:   {plain(texts[name])}" for name in names]
    return found


def heading(name: str, kind: Any, default: Any) -> str:
    """An option, what it takes, and its default."""
    positional = Positional in getattr(kind, "__metadata__", ())
    shown = f"`{name.upper()}`" if positional else f"`--{hyphens(name)}`"
    kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    if get_origin(kind) is Literal:
        takes = ", ".join(f"`{possible}`" for possible in get_args(kind))
    else:
        takes = "" if kind is bool else described(kind)
        for before, after in AS_WORDS.items():
            takes = takes.replace(before, after)
    if default is MISSING:
        return " · ".join(filter(None, [shown, takes, "" if positional else "required"]))
    return " · ".join(
        filter(None, [shown, takes, "" if default in (None, (), {}, "") else f"default {value(default)}"])
    )


def value(given: Any) -> str:
    """A value as it is written on the command line."""
    return f"`{' '.join(words(given)) or 'none'}`" if not isinstance(given, bool) else "yes" if given else "no"


def plain(text: str) -> str:
    """Text whose characters mean themselves in Markdown, but for what stands in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}#|~^$])", r"\\\1", part) for part in parts)


# Python


def api() -> str:
    """The public names, and the modules that a method of one's own builds on."""
    functions = [name for name in leanmim.__all__ if name in leanmim._COMMANDS]
    others = ["build", "restore", "load_backbone", "pyramid", "MIM", "UserError"]
    tables = ["TARGETS", "MASKINGS", "SOURCES"]
    classes = leanmim._NAMES["config"].split()
    parts = [
        "# Python",
        "A command is a function of its configuration, of the configuration's fields by name, or of both.",
        '--8<-- "README.md:python"',
        "## Commands",
        *(directive(name) for name in functions),
        "## Configurations",
        "Frozen dataclasses; their fields are the options of the [commands](commands.md), with underscores. The recipes are values "
        f"of `Pretrain`: {', '.join(f'[`leanmim.{key}`](recipes/{own.recipe}.md)' for own in RECIPES.values() for key in ('_'.join(own.recipe.upper().split('-')),))}, "
        "by name in `leanmim.RECIPES`.",
        "\n".join(f"- `leanmim.{name}`: {(getattr(leanmim, name).__doc__ or '').splitlines()[0]}" for name in classes),
        "## Models",
        *(directive(name) for name in others),
        "## Tables",
        "Names that a configuration may use; [add to them](CONTRIBUTING.md#add-to-it).",
        *(directive(name) for name in tables),
        "## Parts",
        *(
            f"::: leanmim.{module}\n    options:\n      show_root_heading: true\n      heading_level: 3"
            for module in PARTS
        ),
    ]
    return "\n\n".join(parts) + "\n"


PARTS = ("masking", "targets", "schedule", "encoders", "step")


def directive(name: str) -> str:
    """Have mkdocstrings show a public name under its public path."""
    return (
        f"::: leanmim.{leanmim._MODULE_OF[name]}.{name}\n    options:\n      heading: leanmim.{name}\n"
        f"      toc_label: {name}\n      heading_level: 3\n      show_root_heading: true"
    )
