"""A training loop of one's own: a recipe's model, losses and optimizers; photos and crops by torchvision.

    python examples/own_loop.py --data demo/photos --out own

A model's losses are a generator, one for each segment of the encoder. End to end there is one. With `--recipe bim` there are four:
a segment runs when its loss is asked for, and may step, and free its gradients, before the next one begins. OUT gets the encoder,
as timm has it; `leanmim finetune own/encoder.pt --model vit_tiny_patch16_224 --input-size 96 ...` goes on from it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

import leanmim
from leanmim.schedule import learning_rate
from leanmim.step import make_optimizers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Photos(Dataset):
    """Random crops of all JPEG and PNG files below a folder, normalised."""

    def __init__(self, data: Path, size: int) -> None:
        self.files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not self.files:
            raise SystemExit(f"{data}: there is no JPEG or PNG file")
        crops = [v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(
            [v2.ToImage(), *crops, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as photo:
            return self.transform(photo.convert("RGB"))


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and save; the mean loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--recipe", default="mae", choices=leanmim.RECIPES)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name of the architecture")
    parser.add_argument("--size", type=int, default=96, help="of a crop, px")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    torch.manual_seed(given.seed)
    photos = Photos(given.data, given.size)
    drawn = RandomSampler(photos, replacement=True, num_samples=given.steps * given.batch_size)
    feed = DataLoader(photos, given.batch_size, sampler=drawn, num_workers=given.workers)
    recipe = replace(leanmim.RECIPES[given.recipe], model=given.model, input_size=given.size)
    model = leanmim.build(recipe).to(given.device)
    optimizers = make_optimizers(model, recipe)  # an AdamW for each segment; norms, biases and tokens do not decay
    history = []
    for step, images in enumerate(feed):
        lr, losses = learning_rate(step, given.steps, given.steps // 20, given.lr), []
        for loss, optimizer in zip(model.losses(images.to(given.device)), optimizers, strict=True):
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
        if (step + 1) % 50 == 0 or step + 1 == given.steps:
            print(f"step {step + 1}/{given.steps}, losses {' '.join(f'{loss:.3f}' for loss in losses)}", flush=True)

    given.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.encoder.backbone.state_dict(), given.out / "encoder.pt")
    return history


if __name__ == "__main__":
    main()
