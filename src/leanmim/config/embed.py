"""The configuration of `leanmim embed`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from leanmim.config.base import Images, Machine, Number, Pool, check_model, check_size
from leanmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Embed(Machine, Images):
    """Write the features of every image of a folder into a file."""

    FREE: ClassVar[frozenset[str]] = frozenset({"start", "out", "workers", "overwrite"})

    start: Positional[str]
    """A run folder of `leanmim pretrain` or `leanmim finetune`, an exported folder, a checkpoint file of timm (with --model),
    timm's name of published weights, or scratch (with --model): a random initialisation."""
    data: str | tuple[str, ...]
    """Folder of images, flat or nested. Or a quoted pattern of folders or files ("photos/*/raw"), a .txt list of image
    files, tar or Parquet files, or a dataset of Hugging Face. Several may be given."""
    out: str
    """File to write. FILE.npy is one array, and FILE.txt has the images' paths, one a line, in its order. FILE.parquet has
    the columns path and embedding. Unreadable images are left out and listed in FILE.npy.skipped.jsonl. The same command
    again continues where it was interrupted."""
    features: Literal["pooled", "patches"] = "pooled"
    """One vector for each image, or one for each of its patches, row by row. The mean of the patches is what --pool avg gives;
    where the model norms that mean (fc_norm, as a fine-tuned ViT does), they are those before this norm."""
    pool: Pool = "avg"
    """Of pooled features: mean of the patch tokens, the class token, or what the timm model returns."""
    layer: int | None = None
    """After so many blocks of a ViT or stages of another model, before any closing norm; None is after the last one and its
    norm."""

    model: str | None = None
    """timm's name of the architecture; for a checkpoint file and scratch."""
    model_kwargs: dict[str, Number] = field(default_factory=dict)
    """Further arguments for timm.create_model, as pairs; for a checkpoint file and scratch."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number for a square, or height and width. Empty is the start's own."""
    depth: int | None = None
    """Of the first blocks or stages only: of a run with --segments, up to the end of a segment."""
    crop: float | None = None
    """Share of the resized image's side kept by the centre crop; None is 0.875 from 128 px on, 1 below."""
    batch_size: int = 256
    """Images per forward pass."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers in the file; they are computed in float32."""
    overwrite: bool = False
    """Start afresh, whatever the file, or an unfinished one, holds."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_size(self.input_size or (1,))
        check_model(self.model, self.model_kwargs)
        if Path(self.out).suffix not in (".npy", ".parquet"):
            raise UserError(f"--out {self.out!r} is of no known kind; give a name that ends with .npy or .parquet")
        if self.features == "patches" and self.pool != "avg":
            raise UserError("--pool is for pooled features; leave it out, or --features patches")
        if self.layer is not None and self.pool == "timm":
            raise UserError("--pool timm is for the last layer; choose avg or token, or leave --layer out")
