"""ImageNet, or any images of its shape, in folders or Parquet shards; without them, the bundled demo images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from ..errors import UserError
from .batches import TrainingBatch, collate_evaluation, collate_training, normalized
from .bundled_images import BUNDLED_NAME, bundled_image_tree
from .cropping import CentralCrop, Crop, random_resized_crop, shifted, whole
from .images import EvaluationImages, ImageReader, OnBadSample, TrainingImages
from .opening import open_data
from .resolution import ResolutionRamp
from .sampling import EpochSampler, EvaluationLoader, ResumableLoader

Batch = tuple[Tensor, Tensor]

_IMAGENET_SIZE = 224
_DEMO_SIZE = 32
# The published ratio of the side that an evaluation image is scaled to and the side that is cut out of it.
_RESIZE_RATIO = 256 / 224
DEFAULT_SHUFFLE_WINDOW = 2048
_MOST_WORKERS = 16
_FEW_WORKERS_WARNING = ".*does not have many workers.*"


@final
class ImageNetDataModule(LightningDataModule):
    """Batches of (images (N, 3, size, size) float32 in channels-last memory, labels (N,) int64).

    Training data are shuffled and augmented from the seed (``--seed_everything``), the epoch and the image: the same
    for all strategies. The last, smaller batch of a training epoch is left out. ``validate``, ``test`` and
    ``predict`` all read the validation images, every one exactly once, so ranks may get one batch more or less.

    Loaders give bytes; ``on_after_batch_transfer`` makes the network's input of them, on the device.

    Args:
        root: Image folder with ``train/<class>/*`` and ``val/<class>/*``; or Parquet shards ``train-*.parquet`` and
            ``validation-*.parquet`` in a folder or at ``s3://``, ``gs://``, ``hf://``. Without it the bundled
            Fashion-MNIST subset is unpacked into a cache folder (``GRADSYNC_CACHE``, else the XDG cache folder).
        batch_size: Images per training process and step.
        num_workers: Loader processes per training process, for training and validation each. Without it as many as
            the processor has room for, at most 16, and none for the bundled images.
        image_size: Height and width in pixels. 224 without it, and 32 for the bundled images.
        eval_size: The same for evaluation; ``image_size`` without it.
        eval_resize_size: What an evaluation image's shorter side is scaled to before the middle is cut out;
            256/224 of ``eval_size`` without it. Without effect on the bundled images.
        resolution_ramp: Train on smaller images in the first epochs.
        mixup: Parameter of MixUp's Beta distribution; 0 for none. Labels are then (N, num_classes) float32.
        cutmix: The same of CutMix; with both, one of them for each batch.
        random_erasing: Probability that a rectangle of a training image is erased.
        bad_samples: What happens at an image that cannot be read: ``stop``; or ``skip``, and count it in the result.
            In training the next image takes its place, in evaluation it is left out.
        shuffle_window: Images of Parquet shards that are shuffled, and held in memory by each loader process, together.
        cache_dir: Folder for copies of remote shards.

    Attributes:
        num_classes: Number of classes; there after ``setup``, as are the following ones.
        class_names: Names of the classes; a label is an index into it.
        description: One line that says what the data are.
        is_demo: True for the bundled images.
    """

    num_classes: int
    class_names: list[str]
    description: str

    def __init__(
        self,
        root: Path | str | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        image_size: int | None = None,
        eval_size: int | None = None,
        eval_resize_size: int | None = None,
        resolution_ramp: ResolutionRamp | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
        bad_samples: OnBadSample = "stop",
        shuffle_window: int = DEFAULT_SHUFFLE_WINDOW,
        cache_dir: Path | str | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("image_size", image_size), ("eval_size", eval_size)):
            _require(number is None or number >= 1, f"--data.{name} must be >= 1, got {number}")
        _require(batch_size >= 1, f"--data.batch_size must be >= 1, got {batch_size}")
        _require(num_workers is None or num_workers >= 0, f"--data.num_workers must be >= 0, got {num_workers}")
        _require(shuffle_window >= 1, f"--data.shuffle_window must be >= 1, got {shuffle_window}")
        _require(mixup >= 0 and cutmix >= 0, f"--data.mixup and --data.cutmix must be >= 0, got {mixup} and {cutmix}")
        _require(0 <= random_erasing <= 1, f"--data.random_erasing must be from 0 to 1, got {random_erasing}")
        self.is_demo = root is None
        self.root = None if root is None else str(root) if "://" in str(root) else str(Path(root).expanduser())
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size or (_DEMO_SIZE if self.is_demo else _IMAGENET_SIZE)
        self.eval_size = eval_size or self.image_size
        self.eval_resize_size = eval_resize_size or round(self.eval_size * _RESIZE_RATIO)
        _require(
            self.eval_resize_size >= self.eval_size,
            f"--data.eval_resize_size must be >= the {self.eval_size} pixels that are cut out, got {eval_resize_size}",
        )
        self.resolution_ramp = resolution_ramp
        self.bad_samples: OnBadSample = bad_samples
        self.shuffle_window = shuffle_window
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._finish = TrainingBatch(mixup, cutmix, random_erasing)
        self._train: TrainingImages | None = None
        self._val: EvaluationImages | None = None

    @override
    def prepare_data(self) -> None:
        """On one process per machine: unpack the bundled images."""
        if self.root is None:
            bundled_image_tree()

    @override
    def setup(self, stage: str | None = None) -> None:
        """List the images; on every process, before each of fit, validate, test and predict.

        Raises:
            UserError: the folder has not the expected shape, or too few images for the batch size and process count.
        """
        if self._train is None:
            self._open(str(bundled_image_tree()) if self.root is None else self.root)
        self._check_enough_images()

    def _open(self, root: str) -> None:
        opened = open_data(root, self.shuffle_window, self.cache_dir)
        crops: tuple[Crop, Crop] = (random_resized_crop, CentralCrop(self.eval_resize_size))
        train_crop, eval_crop = (shifted, whole) if self.is_demo else crops
        # Lightning takes the seed of the samplers it injects from there, too.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        readers = [ImageReader(source, self.bad_samples) for source in (opened.train, opened.val)]
        self._train = TrainingImages(readers[0], train_crop, self._size_at, seed)
        self._val = EvaluationImages(readers[1], eval_crop, self.eval_size)
        self.class_names = opened.train.class_names
        self.num_classes = len(self.class_names)
        name = f"bundled {BUNDLED_NAME} (demo data" if self.is_demo else f"{root} ({opened.found}"
        size = f"{self.image_size}x{self.image_size}"
        self.description = (
            f"{name}, {self.num_classes} classes): {len(self._train)} train, {len(self._val)} val images of {size}"
        )

    def _size_at(self, epoch: int) -> int:
        ramp = self.resolution_ramp
        return self.image_size if ramp is None else ramp.size_at(epoch, self.image_size)

    def _check_enough_images(self) -> None:
        assert self._train is not None
        assert self._val is not None
        world_size = self.trainer.world_size if self.trainer else 1
        largest = len(self._train) // world_size
        _require(
            self.batch_size <= largest,
            f"--data.batch_size must be <= {largest} ({len(self._train)} training images shared by {world_size}"
            f" training processes), got {self.batch_size}",
        )
        _require(
            len(self._val) >= world_size,
            f"val/ must hold at least one image per training process ({world_size}), got {len(self._val)}:"
            " add images to --data.root or use fewer --trainer.devices",
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        assert self._train is not None, "setup() comes first"
        # Of its own and not Lightning's, because the images must know the epoch. drop_last: no image comes twice.
        sampler = EpochSampler(self._train, seed=self._train.seed, drop_last=True, **self._share())
        options = self._loader_options(drop_last=True, collate_fn=collate_training)
        if self.trainer is None:
            return DataLoader(self._train, sampler=sampler, **options)
        return ResumableLoader(self._train, sampler=sampler, progress=self._progress, **options)

    def _progress(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        assert self._val is not None, "setup() comes first"
        # Lightning's own choice would repeat images to give all ranks the same number, and bias the accuracy.
        sampler = UnrepeatedDistributedSampler(self._val, shuffle=False, **self._share())
        options = self._loader_options(drop_last=False, collate_fn=collate_evaluation)
        return EvaluationLoader(self._val, sampler=sampler, **options)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """What a loader gives, on its device, to what the network takes."""
        if len(batch) == 2:
            images, labels = batch
            return normalized(images), labels
        images, labels, seeds = batch
        module = getattr(self.trainer, "lightning_module", None)
        return self._finish(images, labels, seeds, getattr(module, "num_classes", None) or self.num_classes)

    def bad_sample_flags(self) -> Tensor | None:
        """(train + val images,) uint8: 1 for those that this process could not read; None if they are not skipped."""
        if self.bad_samples == "stop":
            return None
        return torch.cat([reader.is_bad for reader in self._readers()])

    def sample_name(self, index: int) -> str:
        """Of one of the training and validation images, counted in this order."""
        train, val = self._readers()
        first = len(train.source)
        return train.source.name(index) if index < first else val.source.name(index - first)

    def _readers(self) -> tuple[ImageReader, ImageReader]:
        assert self._train is not None, "setup() comes first"
        assert self._val is not None
        return self._train.reader, self._val.reader

    def _share(self) -> dict[str, Any]:
        """Which part of the images this process reads: ``num_replicas`` and ``rank``."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return kwargs or {"num_replicas": 1, "rank": 0}

    def _loader_options(self, **kwargs: Any) -> dict[str, Any]:
        num_workers = self._resolved_num_workers()
        if num_workers == 0:  # chosen on purpose
            warnings.filterwarnings("ignore", _FEW_WORKERS_WARNING, category=PossibleUserWarning)
        return {
            "batch_size": self.batch_size,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **kwargs,
        }

    def _resolved_num_workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        # Reading the bundled images takes a few percent of the time of training on them.
        return 0 if self.is_demo else default_num_workers(_local_processes(self.trainer))


def default_num_workers(num_local_processes: int) -> int:
    """Loader processes of each of so many training processes of this host."""
    return min(_MOST_WORKERS, suggested_max_num_workers(num_local_processes))


def _local_processes(trainer: Any) -> int:
    return trainer.num_devices if trainer else 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
