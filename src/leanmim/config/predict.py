"""The configuration of `leanmim predict`."""

from dataclasses import dataclass

from tyro.conf import Positional

from leanmim.config.base import Machine, check_size
from leanmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Predict(Machine):
    """The classes of images by a fine-tuned model, as a CSV table: path, class, probability, and the next likeliest."""

    run: Positional[str]
    """Run folder of `leanmim finetune`, or an exported classifier with class names (as its export/timm)."""
    images: Positional[tuple[str, ...]]
    """Image files, folders of images, quoted patterns such as 'photos/*/raw', .txt lists of images, tar or Parquet files, or datasets
    of Hugging Face."""
    out: str
    """Table to write, for example predictions.csv. Files that cannot be read are listed next to it, in
    predictions.csv.skipped.jsonl."""
    top: int = 5
    """Classes of each image, the likeliest first; at most as many as there are."""
    batch_size: int = 64
    """Images per forward pass."""
    input_size: tuple[int, ...] = ()
    """Pixels: one number or height and width; empty is the model's own."""
    crop: float | None = None
    """Share of the resized image's side kept by the centre crop; None is the fine-tuning's own; if that had none, 0.875 from
    128 px on, 1 below."""
    overwrite: bool = False
    """Replace the table that is already in --out."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_size(self.input_size or (1,))
        if not self.images:
            raise UserError("give the images, as files or folders: leanmim predict RUN IMAGES --out predictions.csv")
