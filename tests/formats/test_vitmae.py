"""What transformers' ViTMAE can hold; that it computes the same is in test_mim_parity.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Export, Pretrain
from leanmim.errors import UserError
from leanmim.formats import export
from tests.helpers import fake_run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masking": "token"}, "masking drop"),
        ({"model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "reg_tokens": 2}}, "register"),
        ({"input_size": (32, 48)}, "square"),
        ({"loss": "l1"}, "squared error"),
    ],
)
def test_transformers_takes_mae_only(tiny: Pretrain, change: dict, message: str) -> None:
    run = fake_run(replace(tiny, **change), Path(tiny.out))
    with pytest.raises(UserError, match=f"{message}.*--format timm"):
        export(Export(run=run.out, format="transformers"))
