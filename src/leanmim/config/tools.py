"""The configurations of the commands that look at a run, and of those that look ahead."""

from dataclasses import dataclass
from typing import Literal, get_args

from tyro.conf import Positional

from leanmim.config.base import Auto, Config, Machine, Model, Precision, Valued, check_values, parse_bytes
from leanmim.errors import UserError

Picture = Literal["reconstructions", "over-time", "features", "attention", "neighbours", "map", "mistakes"]
COUNTS = dict.fromkeys(get_args(Picture), 8) | {"mistakes": 16, "map": 400}


@dataclass(frozen=True, kw_only=True)
class Show(Config):
    """Draw what runs reconstruct, or another picture of an encoder."""

    runs: Positional[tuple[str, ...]]
    """Run folders of `leanmim pretrain`; reconstructions of several are drawn side by side on the same images, each at its own input
    size. Other pictures take one run, also one of `leanmim finetune`, or, with --images, an exported folder or timm's name of
    published weights."""
    picture: Picture = "reconstructions"
    """reconstructions: original, masked image, reconstruction. over-time: those that pre-training drew as it went (--show-every), rows of
    images, columns of steps. features: of patches, by colour. attention: of the last block, as heat. neighbours: the images most
    alike. map: all images by likeness, in two dimensions. mistakes: of a fine-tuned run, the most confident ones."""
    images: tuple[str, ...] = ()
    """Image files or folders; empty takes the (first) run's own data, of a fine-tuned run its validation images. One folder may have
    a sub-folder for each class, and neighbours and map tell classes; it may also be a tar file or a dataset then."""
    count: int | Auto = "auto"
    """Images at most; of neighbours, those whose neighbours are drawn. auto is 8, of mistakes 16, of a map 400."""
    tiles: int = 0
    """Of reconstructions: draw whole images, cut into tiles of the input size that the model sees one by one, so many along the short
    side. 0 draws the centre of each at the input size."""
    among: int = 5000
    """Of neighbours: images to choose them from, at most, evenly spread over all."""
    out: str | None = None
    """Picture to write; None is PICTURE.png in the run folder, as reconstructions.png, of several runs in the working directory; with
    --segment 0 reconstructions-segment0.png."""
    segment: int | None = None
    """Of a run with --segments: draw the reconstruction of this one alone, 0 is the first; None draws all."""
    seed: int = 0
    """Seed of the masks, the same for all runs, and of the map's arrangement."""

    @property
    def run(self) -> str:
        """The run, where there is one."""
        return self.runs[0]

    @property
    def most(self) -> int:
        """Images at most."""
        return COUNTS[self.picture] if self.count == "auto" else self.count

    def check(self) -> None:
        """Raise UserError for an impossible value, or an option of another picture."""
        super().check()
        if not self.runs:
            raise UserError("give the run folder of a `leanmim pretrain`, or several: leanmim show run")
        if self.picture == "reconstructions":
            return
        if len(self.runs) > 1:
            raise UserError(
                f"--picture {self.picture} takes one run, not {len(self.runs)}; only reconstructions are drawn side by side"
            )
        for option, given in (("segment", self.segment is not None), ("tiles", bool(self.tiles))):
            if given:
                raise UserError(f"--{option} is for reconstructions; leave it out with --picture {self.picture}")


@dataclass(frozen=True, kw_only=True)
class Export(Config):
    """Write a run's encoder, or its classifier, for other libraries."""

    run: Positional[str]
    """Run folder of `leanmim pretrain` or `leanmim finetune`; or one of its checkpoints, as RUN/checkpoints/best.pt."""
    format: Literal["timm", "onnx", "transformers"] = "timm"
    """timm: the backbone; of a fine-tuned run the classifier, with the names of its classes; and a model card, README.md. onnx: the same as a graph, from
    normalised images to features (their mean) and tokens, or to logits. transformers: ViTMAEForPreTraining, decoder
    included (MAE only)."""
    depth: int | None = None
    """Of a run with --segments: the first blocks or stages only, up to the end of a segment. ViT and Swin become shorter
    models closed by the segment's own norm; of other families the whole model is written, its later stages untrained."""
    all_depths: bool = False
    """A model for the end of each segment, in folders depth3, depth6, ... of --out, or export/timm-depth3, ... in the run
    folder."""
    out: str | None = None
    """Folder to write; None is export/FORMAT in the run folder, or export/timm-depth3 for a --depth of 3."""
    overwrite: bool = False
    """Replace files that are already in --out."""
    license: str | None = None
    """Of the weights, for the model card, as the hub spells it: apache-2.0, mit, cc-by-4.0, other. None leaves it to be chosen."""


@dataclass(frozen=True, kw_only=True)
class Publish(Config):
    """Export a run for timm, with a model card, and push it to the Hugging Face hub.

    It logs in as huggingface_hub does: `hf auth login`, or the variable HF_TOKEN.
    """

    run: Positional[str]
    """Run folder of `leanmim pretrain` or `leanmim finetune`; or one of its checkpoints, as RUN/checkpoints/best.pt."""
    repo: Positional[str]
    """OWNER/NAME on the hub; made if it is not there."""
    private: bool = False
    """Make it for its owner's eyes only; a repository that is public already is then refused."""
    license: str | None = None
    """Of the weights, for the model card, as the hub spells it: apache-2.0, mit, cc-by-4.0, other. None leaves it to be chosen."""
    depth: int | None = None
    """Of a run with --segments: the first blocks or stages only, as for `leanmim export`."""


@dataclass(frozen=True, kw_only=True)
class Pack(Config):
    """Shrink every image once, and write all into one tar file that --data takes in place of the folder."""

    data: Positional[str]
    """Folder of images, pattern or list, as for `leanmim pretrain`; or a labelled folder, whose train/CLASS/... the names keep."""
    out: str
    """Tar file to write; its name ends in .tar."""
    size: int = 192
    """Pixels of the short side; smaller images stay as they are. About 1.5 times the --input-size leaves crops their pixels."""
    format: Literal["jpeg", "raw"] = "jpeg"
    """jpeg; or raw, pixels as they are: faster to read, several times as large."""
    quality: int = 90
    """Of JPEG."""
    channels: int = 3
    """Image channels, 1 or 3: what is packed has 8 bits."""
    workers: int = -1
    """Processes that read and shrink; -1 is the CPU's cores less one, of more than 16 half of them."""
    overwrite: bool = False
    """Replace the file, and what is left of an interrupted command."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        if self.channels not in (1, 3):
            raise UserError(
                f"--channels {self.channels}: a pack holds 8-bit images of 1 or 3 channels; give the folder itself to --data"
            )


@dataclass(frozen=True, kw_only=True)
class Stats(Valued):
    """Mean and standard deviation of each channel of the images, as options to paste, and what the images are."""

    data: str | tuple[str, ...]
    """Folder of images, pattern, list or tar file, as for `leanmim pretrain`; several may be given."""
    channels: int = 3
    """Image channels, 1 to 16."""
    count: int = 2048
    """Images that are read at most, drawn at random; each counts the same, whatever its size."""
    seed: int = 0
    """Of the draw."""
    out: str | None = None
    """JSON file to write, for --stats of `pretrain`, `finetune` and others."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_values(self.channels, self.values)


@dataclass(frozen=True, kw_only=True)
class Report(Config):
    """One self-contained HTML page about one or several runs."""

    runs: Positional[tuple[str, ...]]
    """Run folders of `leanmim pretrain` or `leanmim finetune`."""
    out: str | None = None
    """Page to write; None is report.html in the first run folder."""


@dataclass(frozen=True, kw_only=True)
class Cost(Model):
    """What one training step of a recipe costs: FLOPs, parameters, memory. Counted, without running it."""

    recipes: Positional[tuple[str, ...]] = ()
    """Recipes; the first is what the others are compared with. None is all. Any option of `pretrain` may follow a name, for
    that row only: mae pr-mim:throw=0.7 "bim:segments=3 6 12,decoder-depth=2"."""
    model: str = "vit_base_patch16_224"
    """timm model name."""
    batch_size: int = 256
    """Images of one forward pass."""
    accum: int = 1
    """Forward passes whose gradients are averaged into one step."""
    precision: Precision = "auto"
    """Of the forward pass; auto is bf16 on cuda, fp32 on cpu."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Count as on this device; it need not be there. auto is cuda if there is one."""
    json: bool = False
    """Print JSON, a list with one object for each recipe, instead of tables; one that cannot be counted has an "error"."""


@dataclass(frozen=True, kw_only=True)
class Plan(Machine, Model):
    """Which recipes fit the memory, at which batch, how long they take on this machine, and the commands."""

    recipes: Positional[tuple[str, ...]] = ()
    """Recipes to look at; none is all. Any option of `pretrain` may follow a name: mae pr-mim:throw=0.7."""
    data: str
    """Folder of images, pattern, list, tar file or dataset, as `pretrain` takes them."""
    memory: str = "auto"
    """Memory to stay within, for example 8GiB; auto is what the device has free."""
    hours: float | None = None
    """Time there is; none given is one hour."""
    epochs: int | float | Auto = "auto"
    """Passes over the data; auto takes as many as fit into --hours."""
    effective_batch: int | Auto = "auto"
    """Images per step, over several forward passes where they do not fit at once. auto is fewer where there would be too few
    steps."""
    images_per_second: float | None = None
    """Throughput of the first recipe; the others' follow from their FLOPs. None measures real steps of each, some
    seconds."""
    precision: Precision = "auto"
    """Of the forward pass; auto is what a run would choose."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        parse_bytes(self.memory)
