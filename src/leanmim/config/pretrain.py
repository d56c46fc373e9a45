"""The configuration of `leanmim pretrain`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leanmim.config.base import (
    AGAINST_DIVERGENCE,
    FREE_IN_TRAINING,
    Auto,
    Computing,
    Decode,
    Faults,
    Images,
    Interpolation,
    LinearInit,
    Logging,
    Loss,
    Masking,
    Model,
    Optimisation,
    Segments,
    Select,
    Start,
    Target,
    check_pair,
    check_size,
    flag,
    uncut,
)
from leanmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Pretrain(Logging, Faults, Computing, Optimisation, Model, Images):
    """Everything that defines a pre-training run. The recipes are values of this class.

    A value is checked by `check`, and names of maskings and targets where they are looked up: a third party may add some.
    """

    FREE: ClassVar[frozenset[str]] = FREE_IN_TRAINING | {
        "offload", "pipeline", "shard", "checkpointing", "update_in_backward", "cuda_graph", "knn_data", "knn_every", "show_every"
    }  # fmt: skip
    ADJUSTABLE: ClassVar[frozenset[str]] = AGAINST_DIVERGENCE | {"phase_blrs", "decode"}
    LEFT_EMPTY: ClassVar[frozenset[str]] = frozenset({"data", "out"})
    GROWING: ClassVar[frozenset[str]] = frozenset({"epochs"})
    RENAMED: ClassVar[dict[str, str]] = {
        f"stage_{name}": f"phase_{name}" for name in ("scales", "starts", "batches", "accums", "blrs")
    }

    data: str | tuple[str, ...]
    """Folder of images, flat or nested; labels are not needed and ignored. Or a quoted pattern of folders or files
    ("photos/*/raw"), a .txt list of image files, one path a line, relative to the list, or tar files, one or a quoted pattern of
    them (of `leanmim pack`, WebDataset's shards; also by URL, "https://host/a-{000..010}.tar"). Or a folder that Hugging Face's
    datasets saved, or Parquet files of its hub. Several may be given; a file in two of them counts once."""
    out: str
    """Run folder. The same command again continues the run in it."""
    recipe: str = "mae"
    """Name of the recipe, for the records."""

    input_size: tuple[int, ...] = (224,)
    """Pixels: one number for a square, or height and width."""
    init: str | None = None
    """Start from these weights: a leanmim run folder or export folder, a checkpoint file of timm or leanmim, or timm's name of
    published weights, as vit_tiny_patch16_224.augreg_in21k_ft_in1k."""
    phase_scales: tuple[float, ...] = ()
    """Progressive resolution (FastMIM-P): the size of each phase as a multiple of --input-size. Empty is one phase."""
    phase_starts: tuple[float, ...] = ()
    """Where each phase begins, as a share of the epochs: 0 first, then rising."""
    phase_batches: tuple[int, ...] = ()
    """Batch size of each phase; empty is --batch-size for all."""
    phase_accums: tuple[int, ...] = ()
    """Accumulation of each phase; empty is --accum for all."""
    phase_blrs: tuple[float, ...] = ()
    """Base learning rate of each phase; empty is --blr for all. lr = blr x the phase's effective batch / 256."""

    depth: int | None = None
    """Pre-train only so many blocks of a ViT, or stages of a hierarchical model, the first ones. None is all."""
    linear_init: LinearInit = "timm"
    """Initial weights of the linear layers of a hierarchical model: timm's own, or Xavier-uniform with zero biases
    (FastMIM). A plain ViT has the latter always (MAE)."""
    masking: Masking | str = "drop"
    """How the mask reaches the backbone: drop masked tokens (MAE, plain ViT), put a learned token there (SimMIM, ViT
    and Swin), or paint a learned colour on the image (FastMIM, any timm backbone)."""
    mask_ratio: float | tuple[float, ...] = 0.75
    """Share of the image that is masked, in (0, 1). With --segments also one for each, not falling (BIM: later segments
    see fewer patches); or two, the first's and the last's, with equal steps between."""
    mask_unit: int = 0
    """Side of the squares that are masked, px; 0 is one patch. With pixel masking it may be less than a patch."""
    target: Target | str = "pixels"
    """What is predicted: pixels normalised patch by patch, raw pixels of the normalised image, or histograms of
    oriented gradients (FastMIM)."""
    hog_cell: int = 8
    """Side of HOG's cells, px; it divides the patch."""
    loss: Loss = "l2"
    """Compared by absolute or by squared difference, on masked patches only."""
    decoder_depth: int | Auto = "auto"
    """Transformer layers of the decoder; 0 is one linear layer (not with drop). auto is the published number from ViT-B on
    (MAE 8, BIM 1; FastMIM 1 for a ViT and 4 for a hierarchical backbone), fewer below."""
    decoder_width: int | Auto = "auto"
    """Width of the decoder. auto is the published number from ViT-B on (MAE 512, FastMIM 256), less below."""
    decoder_heads: int | Auto = "auto"
    """Attention heads of the decoder; auto is one for 32 channels."""
    segments: Segments = 1
    """Block-wise training (BIM): cut the backbone into so many equal segments, each trained by a decoder and loss of its
    own; or the blocks after which a segment ends, for example 3 6 12. Blocks of a ViT, stages of a hierarchical model, as
    --depth counts them."""
    offload: bool = False
    """Let what is not worked on wait in host memory. With --segments only one segment and the next are on the GPU: weights,
    gradients and optimizer state, but for moments of 8 bits. End to end it is the optimizer's state. Same numbers, less GPU
    memory, more time.
    With --segments and --accum each batch's target and activations at the segments' border wait on the GPU: `leanmim cost` counts it."""
    pipeline: bool = False
    """With --segments, under torchrun: the processes share the segments and not the images. Each runs its segments on one batch
    while the next process runs its own on the batch before. Same numbers as in one process."""
    shard: bool = False
    """In several processes (torchrun): each keeps its share of the weights, gradients and optimizer state, and gathers the
    weights of a block when it computes it (FSDP2). Same numbers but for rounding, less memory, more traffic."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the input of each block for the backward pass, and compute the rest again. Same numbers,
    less memory, about a fifth more computation. Not for backbones with batch norms."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits, a quarter of the memory, as torchao does it (pip install
    'leanmim[memory]'). For GPUs, where the host waits for the device once a step: on a CPU it is not compiled, and slow."""
    update_in_backward: bool = False
    """Step each parameter in the backward pass, as soon as its gradient is there, and free that. Same numbers, hardly any
    gradients in memory. For one process or --pipeline, --accum 1 and no --clip-grad."""
    cuda_graph: bool | Auto = "auto"
    """On a GPU, record a step and repeat it as a CUDA graph, which spares small models the wait for launches. Same numbers but for
    the rounding of the learning rate. For one process and --accum 1, without another way to save memory. auto measures on a GPU."""
    throw: float = 0.0
    """Partial reconstruction (PR-MIM): share of all patches, masked ones, that the decoder's layers do not see. 0 is
    full reconstruction. With --decoder-depth 0 there are no layers, and little is saved."""
    select: Select = "furthest"
    """With --throw: which masked patches are decoded, those furthest from each other or random ones."""
    select_start: Start = "visible"
    """With --select furthest: what to be far from at first, all visible patches or one random masked patch."""
    fill: int = 1
    """With --throw: rounds in which thrown patches are filled in from decoded and visible ones, from the second round on
    from each other too, and compared as well. 0 is plain partial reconstruction: thrown patches do not count."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """RandomResizedCrop: share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height of the crop."""
    interpolation: Interpolation = "bicubic"
    """How crops are resized."""
    decode: Decode = "fast"
    """fast chooses the crop first and decodes a JPEG at the smallest scale (1, 1/2, 1/4, 1/8) that leaves it its pixels; exact
    decodes every image whole, as torchvision does."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    statistics: Literal["imagenet", "data"] = "imagenet"
    """Mean and standard deviation for normalisation, where --mean and --std or --stats do not give them: ImageNet's, or computed
    from the data, as they always are for stored values."""

    seed: int = 0
    """Seed of weights, order, crops and masks."""

    knn_data: str | None = None
    """Labelled folder or pack (train/CLASS, val/CLASS) for a kNN accuracy during training."""
    knn_every: int = 10
    """Epochs between two kNN accuracies; there is always one at the end."""

    show_every: int | Auto = "auto"
    """Epochs between two pictures of four images and what is reconstructed of them, for `leanmim show run --picture over-time`,
    the report and TensorBoard. auto draws eight: before the first step, after 1/64 of the steps, 1/32, and so on, doubling, to the last.
    0 draws none. A picture costs a forward pass of four images, and changes nothing in the training."""

    @property
    def mask_ratios(self) -> tuple[float, ...]:
        """As given: one for all segments, one for each, or the first's and the last's."""
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,)

    @property
    def segment_ratios(self) -> tuple[float, ...]:
        """One mask ratio for each segment. Raises UserError if the numbers given are not those of the segments."""
        given, count = self.mask_ratios, self.segments if isinstance(self.segments, int) else len(self.segments)
        if len(given) == 1:
            return given * count
        if len(given) == 2 < count:
            low, high = given
            return tuple(round(low + (high - low) * i / (count - 1), 6) for i in range(count))
        if len(given) != count:
            raise UserError(
                f"--mask-ratio gives {len(given)} numbers for {count} segments; give one for all, one for each of "
                "--segments, or the first's and the last's"
            )
        return given

    @property
    def cut(self) -> bool:
        """Whether the backbone is cut into several segments."""
        return not uncut(self.segments)

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        super().check()
        check_size(self.input_size)
        self.check_masks()
        self.check_memory_options()
        self.check_decoder()
        self.check_phases()
        self.check_batches()
        self.check_shares()
        self.check_graph()
        check_pair("crop_scale", self.crop_scale)
        check_pair("crop_ratio", self.crop_ratio)

    def check_masks(self) -> None:
        """Ratios."""
        if not self.mask_ratios:
            raise UserError("--mask-ratio takes one number, one for each segment, or the first's and the last's")
        if list(self.mask_ratios) != sorted(self.mask_ratios):
            raise UserError(
                f"--mask-ratio {' '.join(map(str, self.mask_ratios))} falls; a later segment cannot see what an earlier one "
                "did not: give ratios that stay or rise"
            )

    def check_shares(self) -> None:
        """What does not go with segments or a model that processes share out."""
        if self.pipeline and not self.cut:
            raise UserError(
                "--pipeline shares the segments among the processes, and training end to end is one segment; give --segments (as "
                "`leanmim pretrain bim` does), or leave it out: then the processes share the images"
            )
        if self.pipeline and self.offload:
            raise UserError(
                "--pipeline keeps the segments of a process on its GPU, --offload only one of them; give --no-offload, or leave it out"
            )
        if self.offload and self.cut and self.channels_last is True:
            raise UserError(
                "--offload keeps a segment's weights side by side in one piece of memory, and --channels-last lays them out in another "
                "way; leave one of them out"
            )
        for name in ("offload", "pipeline", "compile", "channels_last"):
            if self.shard and getattr(self, name) is True:
                raise UserError(f"--shard and {flag(name)} do not go together; leave one of them out")

    def check_graph(self) -> None:
        """What cannot be recorded."""
        if self.cuda_graph is True and (other := self.not_recorded):
            raise UserError(f"--cuda-graph and {other} do not go together; leave one of them out")

    @property
    def not_recorded(self) -> str:
        """An option with which a step cannot be recorded; empty if there is none."""
        for name in ("offload", "pipeline", "shard", "checkpointing", "update_in_backward"):
            if getattr(self, name):
                return flag(name)
        if self.optimizer != "adamw":
            return f"--optimizer {self.optimizer}"
        return f"--accum {self.accum}" if max(self.accum, *self.phase_accums, 1) > 1 else ""

    def check_memory_options(self) -> None:
        """Ways to save memory, and what they do not go with."""
        if self.update_in_backward and self.clip_grad:
            raise UserError(
                "--update-in-backward steps the first parameters before the norm of all gradients is known; give --clip-grad 0, or "
                "leave --update-in-backward out"
            )
        if self.update_in_backward and max(self.accum, *self.phase_accums, 1) > 1:
            raise UserError(
                "--update-in-backward frees each gradient at once, so none can be accumulated; give --accum 1, or leave "
                "--update-in-backward out"
            )
        if self.optimizer == "adamw8bit" and self.phase_scales:
            raise UserError(
                "--optimizer adamw8bit keeps moments in blocks, which cannot be resized from one phase to the next; leave "
                "--phase-scales out, or give --optimizer adamw"
            )
        if self.optimizer == "adamw8bit" and self.channels_last is True:
            raise UserError(
                "--optimizer adamw8bit does not take weights in another memory format; leave --channels-last out"
            )
        if self.optimizer == "adamw8bit" and (self.shard or self.pipeline):
            raise UserError(
                "--optimizer adamw8bit keeps its state in a form of its own, which --shard and --pipeline do not share; leave them out, "
                "or give --optimizer adamw"
            )

    def check_decoder(self) -> None:
        """Depth, width and heads."""
        if self.decoder_depth == 0 and self.masking == "drop":
            raise UserError(
                "--decoder-depth 0 is a linear head on masked tokens, which --masking drop leaves out; "
                "use --masking token, or at least 1 layer"
            )
        if "auto" in (self.decoder_width, self.decoder_heads) or not self.decoder_depth:
            return
        width, heads = int(self.decoder_width), int(self.decoder_heads)
        if width % 4 or width % heads:
            raise UserError(f"--decoder-width {width} must be a multiple of 4 and of --decoder-heads {heads}")

    def check_phases(self) -> None:
        """Sizes and starts (FastMIM-P)."""
        count = len(self.phase_scales)
        if len(self.phase_starts) != count:
            raise UserError(
                f"--phase-starts has {len(self.phase_starts)} numbers for {count} --phase-scales; give one each"
            )
        rising = all(low < high for low, high in zip(self.phase_starts, (*self.phase_starts[1:], 1.0), strict=False))
        if count and (self.phase_starts[0] != 0 or not rising or not min(self.phase_scales) > 0):
            raise UserError(
                f"--phase-starts {self.phase_starts} must begin with 0, rise and stay under 1, and --phase-scales "
                f"{self.phase_scales} be above 0"
            )
        for name in ("phase_batches", "phase_accums", "phase_blrs"):
            values = getattr(self, name)
            if values and (len(values) != count or not min(values) > 0):
                raise UserError(f"{flag(name)} {values} must be {count} numbers above 0, one for each phase")

    def check_batches(self) -> None:
        """Batches and learning rates of the phases."""
        if self.batch_size == "auto" and (self.phase_batches or self.phase_accums):
            raise UserError(
                "--batch-size auto chooses batch and accumulation itself; leave those of the phases out, or give --batch-size"
            )
        if self.lr is not None and self.phase_blrs:
            raise UserError("--lr and --phase-blrs are two ways to give the learning rate; leave one out")
