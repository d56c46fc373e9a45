"""Every field of every command is in one group."""

from collections import Counter
from dataclasses import fields

import pytest

from leanmim.cli import COMMANDS
from leanmim.config import Evaluate, Export, Pretrain
from leanmim.config.groups import COMMON, FEW, GROUPS, groups

LISTED = [name for names in GROUPS.values() for name in names.split()]


@pytest.mark.parametrize("kind", [row.config for row in COMMANDS.values()])
def test_every_field_is_in_one_group(kind: type) -> None:
    found = groups(kind)
    assert sorted(name for names in found.values() for name in names) == sorted(own.name for own in fields(kind))
    assert next(iter(found)) == COMMON
    assert list(found) == [group for group in GROUPS if group in found]
    assert len(found) == 1 or len(fields(kind)) > FEW


def test_the_table_names_fields_that_there_are_once() -> None:
    assert not [name for name, count in Counter(LISTED).items() if count > 1]
    kinds = {row.config.__name__: row.config for row in COMMANDS.values()}
    large = [kind for kind in kinds.values() if len(fields(kind)) > FEW]
    for name in LISTED:
        owner, _, plain = name.rpartition(".")
        assert any(own.name == plain for kind in ([kinds[owner]] if owner else large) for own in fields(kind)), name


def test_a_name_behind_a_class_goes_before() -> None:
    assert "epochs" in groups(Pretrain)[COMMON]
    assert "epochs" in groups(Evaluate)["evaluation"]


def test_a_command_with_few_options_has_its_own_first() -> None:
    assert list(groups(Export)) == [COMMON]
    assert groups(Export)[COMMON][:2] == ["run", "format"]
