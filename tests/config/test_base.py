"""Every field is declared once and explained; a configuration is stored as JSON and compared."""

import inspect
import json
from dataclasses import fields, replace

import pytest

from leanmim import config as configurations
from leanmim.cli import COMMANDS
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.recipes import FASTMIM, RECIPES
from tests.config.docstrings import docstrings


@pytest.mark.parametrize("kind", [row.config for row in COMMANDS.values()])
def test_every_field_has_a_docstring(kind: type) -> None:
    found = docstrings(kind)
    assert set(found) == {field.name for field in fields(kind)}
    for name, text in found.items():
        assert text.endswith("."), f"{kind.__name__}.{name}"


def test_every_configuration_belongs_to_a_command() -> None:
    kinds = {
        kind for _, kind in inspect.getmembers(configurations, inspect.isclass) if hasattr(kind, "__dataclass_fields__")
    }
    bases = {base for kind in kinds for base in kind.__mro__[1:]}
    assert kinds - bases == {row.config for row in COMMANDS.values()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_survives_json(name: str) -> None:
    config = replace(RECIPES[name], data="d", out="o", model_kwargs={"depth": 3}, segments=1)
    stored = json.loads(json.dumps(config.to_json()))
    assert Pretrain.from_json(stored) == config
    assert config.changes(stored) == []


def test_the_names_of_version_0_1_0_are_read() -> None:
    config = Pretrain(
        data="d", out="o", phase_scales=(1.0, 1.25), phase_starts=(0.0, 0.5), phase_batches=(4, 2), phase_accums=(1, 2),
        phase_blrs=(0.1, 0.2),
    )  # fmt: skip
    stored = {name.replace("phase_", "stage_"): value for name, value in config.to_json().items()}
    assert stored["stage_scales"] == [1.0, 1.25]
    assert Pretrain.from_json(stored) == config
    assert config.changes(stored) == []
    assert replace(config, phase_batches=(4, 3)).changes(stored) == ["phase_batches: [4, 2] there, [4, 3] now"]


def test_what_a_stored_configuration_lacks_had_its_default() -> None:
    """FastMIM's warm-up was 5 % in version 0.1.0, which had no such field."""
    config = replace(FASTMIM, data="d", out="o")
    stored = {name: value for name, value in config.to_json().items() if name not in ("warmup_share", "linear_init")}
    assert config.changes(stored) == [
        "linear_init: 'timm' there, 'xavier' now",
        "warmup_share: 0.05 there, 0.025 now",
    ]


def test_a_field_that_nobody_knows_is_an_error() -> None:
    stored = replace(FASTMIM, data="d", out="o").to_json() | {"teacher": "dino", "heads": 3}
    with pytest.raises(UserError, match=r"does not know \(heads, teacher\); another version wrote it"):
        Pretrain.from_json(stored)
