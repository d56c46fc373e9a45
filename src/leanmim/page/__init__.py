"""One self-contained HTML page about one or several runs: no scripts, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from itertools import cycle
from pathlib import Path

from leanmim.config import Report
from leanmim.errors import UserError
from leanmim.names import run_names
from leanmim.page import sections
from leanmim.page.charts import COLOURS
from leanmim.page.load import Loaded, load
from leanmim.run import write_atomically
from leanmim.version import __version__


def report(config: Report) -> Path:
    """Write one HTML page about one or several runs, finished or not.

    Returns:
        The page.

    Raises:
        UserError: a folder is not a run, its configuration cannot be read, or the page cannot be written.
    """
    config.check()
    if not config.runs:
        raise UserError(
            "give the run folder of a `leanmim pretrain` or `leanmim finetune`, or several: leanmim report run"
        )
    called = zip(config.runs, run_names(config.runs), cycle(COLOURS), strict=False)
    runs = [load(Path(folder), *rest) for folder, *rest in called]
    path = Path(config.out) if config.out else Path(config.runs[0]) / "report.html"
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the name of a page with --out")
    page = render(runs).encode("utf-8", "backslashreplace")  # the name of a file or folder need not be text
    try:
        write_atomically(path, lambda file: file.write_bytes(page))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error}); choose another --out") from error
    return path


def render(runs: Sequence[Loaded]) -> str:
    """The page's HTML."""
    title = ", ".join(run.name for run in runs)
    return document(title, {heading: section(runs) for heading, section in sections.SECTIONS.items()})


def document(title: str, bodies: Mapping[str, str]) -> str:
    """A whole page of sections, HTML by heading; empty ones are left out."""
    title = escape(title)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    style = files("leanmim.page").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} - leanmim</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="soft">leanmim {__version__}, page written {now}</p>\n'
        + "\n".join(f"<section>\n<h2>{heading}</h2>\n{body}\n</section>" for heading, body in bodies.items() if body)
        + "\n</body>\n</html>\n"
    )
