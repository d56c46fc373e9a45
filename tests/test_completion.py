"""The shell completes commands, recipes, options and their values."""

import shutil
import subprocess
from pathlib import Path

import pytest

from leanmim.cli import COMMANDS
from leanmim.completion import print_completion
from leanmim.errors import UserError
from leanmim.recipes import RECIPES

ASK = """
source {script}
COMP_WORDS=({words} ''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p leanmim | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    with pytest.raises(SystemExit) as end:
        print_completion(["bash"], COMMANDS)
    assert end.value.code in (0, None)
    file = tmp_path / "leanmim.bash"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("leanmim", set(COMMANDS)),
        ("leanmim pretrain", set(RECIPES)),
        ("leanmim pretrain mae --statistics", {"imagenet", "data"}),
        ("leanmim probe run --solver", {"lars", "fast"}),
    ],
)
def test_bash_is_offered(script: Path, words: str, offered: set[str]) -> None:
    ask = ASK.format(script=script, words=words)
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert offered <= set(done.stdout.split())


def test_zsh_is_offered_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        print_completion(["zsh"], COMMANDS)
    script = capsys.readouterr().out
    assert script.startswith("#compdef leanmim") and "--decoder-depth" in script


@pytest.mark.parametrize("given", [["csh"], [], ["bash", "zsh"]])
def test_another_shell_is_an_error_that_names_the_two(given: list[str]) -> None:
    with pytest.raises(UserError, match="--print-completion takes the name of a shell: bash or zsh"):
        print_completion(given, COMMANDS)
