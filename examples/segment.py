"""Semantic segmentation from a pre-trained encoder: segmentation_models_pytorch's UPerNet decoder on leanmim's pyramid.

    python examples/segment.py --start run --data camvid --classes 11 --out segmented

DATA holds images/train, images/val, masks/train and masks/val (or train/images and so on). The mask of an image is a PNG file of its name, whose values
are the classes, from 0; other values are void: neither trained nor counted. It wants `pip install ".[examples]"`.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from segmentation_models_pytorch.metrics import get_stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import leanmim
from leanmim.schedule import learning_rate

VOID = 255


class Segmenter(nn.Module):
    """A pyramid, a decoder, a class for each pixel."""

    def __init__(self, start: str, model: str | None, classes: int, width: int) -> None:
        super().__init__()
        self.pyramid = leanmim.pyramid(start, width, model=model)
        widths = [self.pyramid.out_channels] * 4
        self.decoder = UPerNetDecoder(encoder_channels=[0, 0, *widths], decoder_channels=widths[0])
        self.head = SegmentationHead(widths[0], classes, kernel_size=1, upsampling=4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, batch x classes x height x width, of normalised images."""
        maps = [images, images, *self.pyramid(images).values()]  # the decoder skips strides 1 and 2
        height, width = images.shape[2:]
        return self.head(self.decoder(maps))[..., :height, :width]  # without the pyramid's padding


class Fit(nn.Module):
    """An image scaled so that it just fits into height x width; its mask as it is."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.scale = v2.ScaleJitter(size, (1, 1))

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image and mask."""
        return self.scale(image), mask


class Scenes(Dataset):
    """Images with their masks."""

    def __init__(self, data: Path, part: str, classes: int, transform: v2.Transform) -> None:
        form = "{}/{}" if (data / "images").is_dir() else "{1}/{0}"
        self.images = sorted((data / form.format("images", part)).iterdir())
        self.masks = [data / form.format("masks", part) / f"{image.stem}.png" for image in self.images]
        self.classes, self.transform = classes, transform
        if not self.images or not all(mask.is_file() for mask in self.masks):
            raise SystemExit(f"{data}: there are no images of {part}, or the PNG file of a mask is not there")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = tv_tensors.Image(Image.open(self.images[index]).convert("RGB"))
        mask = v2.functional.pil_to_tensor(Image.open(self.masks[index]))[:1]
        mask[mask >= self.classes] = VOID
        image, mask = self.transform(image, tv_tensors.Mask(mask))
        return image, mask[0].long()


def classes_of(model: Segmenter, images: Tensor, size: torch.Size) -> Tensor:
    """The class of each pixel, of maps that are resized to height and width."""
    return interpolate(model(images), size, mode="bilinear").argmax(1).cpu()


def evaluate(model: Segmenter, loader: DataLoader, classes: int, device: str) -> Tensor:
    """Intersection over union of each class, over all pixels; NaN for a class that neither is there nor was predicted."""
    counts = torch.zeros(3, classes)
    model.eval()
    with torch.inference_mode():
        for images, masks in loader:
            found = classes_of(model, images.to(device), masks.shape[1:])
            hit, wrong, missed, _ = get_stats(found, masks, mode="multiclass", ignore_index=VOID, num_classes=classes)
            counts += torch.stack([hit.sum(0), wrong.sum(0), missed.sum(0)])
    return counts[0] / counts.sum(0)


def draw(model: Segmenter, scenes: Scenes, file: Path, device: str) -> None:
    """Four images, their masks, and what the model makes of them."""
    model.eval()
    rows = min(4, len(scenes))
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.4 * rows), squeeze=False)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (model.pyramid.std, model.pyramid.mean))
    for row, index in zip(axes, torch.linspace(0, len(scenes) - 1, rows).long().tolist(), strict=True):
        image, mask = scenes[index]
        with torch.inference_mode():
            found = classes_of(model, image[None].to(device), mask.shape)[0]
        row[0].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        for axis, values in ((row[1], mask), (row[2], found)):
            axis.imshow(values.numpy(), cmap="tab20", vmin=0, vmax=scenes.classes, interpolation="nearest")
    for axis, title in zip(axes[0], ("image", "mask", "prediction"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> float:
    """Train, measure, draw; the mean of the classes' intersections over unions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--start", required=True, help="run or export folder, timm's name of published weights, or scratch"
    )
    parser.add_argument("--model", help="timm's name of the architecture, for scratch")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--classes", required=True, type=int)
    parser.add_argument(
        "--crop",
        type=int,
        nargs=2,
        default=(352, 480),
        help="height and width, px, of training crops, which are of images of half to double that size, and that images are measured at",
    )
    parser.add_argument("--width", type=int, default=256, help="channels of pyramid and decoder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    torch.manual_seed(given.seed)
    model = Segmenter(given.start, given.model, given.classes, given.width).to(given.device)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(model.pyramid.mean, model.pyramid.std)]
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: VOID}
    crops = [v2.ScaleJitter(given.crop, (0.5, 2.0)), v2.RandomCrop(given.crop, pad_if_needed=True, fill=fill)]
    train = Scenes(given.data, "train", given.classes, v2.Compose([*crops, v2.RandomHorizontalFlip(), *last]))
    val = Scenes(given.data, "val", given.classes, v2.Compose([Fit(given.crop), *last]))
    drawn = torch.utils.data.RandomSampler(train, num_samples=given.steps * given.batch_size)
    feed = DataLoader(train, given.batch_size, sampler=drawn, num_workers=given.workers)

    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.05)
    warmup = max(1, given.steps // 10)
    for step, (images, masks) in enumerate(feed, 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, given.steps + 1, warmup, given.lr)
        model.train()
        loss = cross_entropy(model(images.to(given.device)), masks.to(given.device), ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == given.steps:
            print(f"step {step}/{given.steps}, loss {loss.item():.3f}", flush=True)

    given.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), given.out / "model.pt")
    draw(model, val, given.out / "predictions.png", given.device)
    each = evaluate(model, DataLoader(val, 1), given.classes, given.device)
    print("IoU of each class:", ", ".join(f"{100 * value:.1f}" for value in each.tolist()))
    mean = each.nanmean().item()
    print(f"mIoU {100 * mean:.2f} % of {len(val)} images; predictions in {given.out / 'predictions.png'}")
    return mean


if __name__ == "__main__":
    main()
