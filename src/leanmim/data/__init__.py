"""Images on disk -> batches.

Order and crops are pure functions of (seed, epoch, index), whatever the number of workers, so a run can be
continued at any step.
"""

from leanmim.data.batches import batches, collate, effective_batch, loader, resolve_workers
from leanmim.data.crops import IMAGENET, Crops, Normalise, centre_crop, cut_centre
from leanmim.data.find import ARRAY, SUFFIXES, list_images
from leanmim.data.hub import Hub, open_hub
from leanmim.data.labelled import Labelled, labelled_pair
from leanmim.data.labels import images_at
from leanmim.data.order import Order, epoch_order, order_of_steps, seed_of
from leanmim.data.read import UNREADABLE, Bad, read_image
from leanmim.data.remote import open_remote
from leanmim.data.shards import Shards
from leanmim.data.source import SOURCES, Files, Folder, Source, absolute, open_source
from leanmim.data.stats import statistics
from leanmim.data.tar import Tar, open_tar

__all__ = [
    "ARRAY", "IMAGENET", "SOURCES", "SUFFIXES", "UNREADABLE", "Bad", "Crops", "Files", "Folder", "Hub", "Labelled", "Normalise", "Order",
    "Shards", "Source", "Tar", "absolute", "batches", "centre_crop", "collate", "cut_centre", "effective_batch", "epoch_order", "images_at",
    "labelled_pair", "list_images", "loader", "open_source", "order_of_steps", "read_image", "resolve_workers", "seed_of", "statistics",
]  # fmt: skip

SOURCES += [open_tar, open_hub, open_remote]
