"""The help page of every command: its options in groups, no line wider than the terminal."""

import re

import pytest

from leanmim.cli import COMMANDS, main
from leanmim.config.groups import COMMON, groups
from leanmim.recipes import RECIPES

LINES = [*([name] for name in COMMANDS if name != "pretrain"), *(["pretrain", recipe] for recipe in RECIPES)]
TITLE = re.compile(r"^(?:╭─)? (positional arguments|(?:[\w-]+ )?options) ")  # framed, where the encoding can
OPTION = re.compile(r"^[│ ] (?:--([a-z-]+)|\[?([A-Z]+)\]?)(?=[ ,])")


def shown(line: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """By title of its box, the options of a help page, or what stands for an argument without one."""
    with pytest.raises(SystemExit) as end:
        main([*line, "--help"])
    assert not end.value.code
    found: dict[str, list[str]] = {}
    for text in capsys.readouterr().out.splitlines():
        if title := TITLE.match(text):
            found[title[1]] = own = []
        elif option := OPTION.match(text):
            own.append((option[1] or option[2].lower()).replace("-", "_"))
    return found


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_the_groups_of_a_help_page(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    parts, found = groups(COMMANDS[line[0]].config), shown(line, capsys)
    positional = found.pop("positional arguments", [])
    assert list(found) == ["options" if group == COMMON else f"{group} options" for group in parts]
    assert [[*names] for names in found.values()] == [
        [name for name in names if name not in positional] for names in parts.values()
    ]
    assert set(positional) <= set(parts[COMMON])


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_no_line_is_wider_than_the_terminal(
    line: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*line, "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns


def test_the_page_of_pretrain_begins_with_what_everybody_needs() -> None:
    parts = groups(COMMANDS["pretrain"].config)
    assert list(parts) == [
        "common", "data", "augmentation", "model", "masking", "target", "decoder", "block-wise", "phase", "optimisation",
        "evaluation", "memory", "machine", "logging", "fault",
    ]  # fmt: skip
    assert parts["common"][:3] == ["data", "out", "model"]
    assert {"epochs", "batch_size", "input_size"} <= set(parts["common"])
