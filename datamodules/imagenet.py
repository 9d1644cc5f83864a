"""ImageNet, or any image folder of its shape; without one, the bundled demo images in the same shape."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, final

from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from typing_extensions import override

from ..errors import UserError
from .bundled_images import BUNDLED_NAME, bundled_image_tree
from .sampling import EpochSampler, ResumableLoader
from .training_images import TrainingImages, load_image
from .transforms import demo_eval_transform, demo_train_transform, eval_transform, train_transform

Batch = tuple[Tensor, Tensor]

_IMAGENET_SIZE = 224
_DEMO_SIZE = 32
_MOST_WORKERS = 16
_FEW_WORKERS_WARNING = ".*does not have many workers.*"


@final
class ImageNetDataModule(LightningDataModule):
    """Batches of (images (N, 3, size, size) float32, labels (N,) int64) from ``train/<class>/*`` and ``val/<class>/*``.

    Training data are shuffled and augmented from the seed (``--seed_everything``), the epoch and the image: the same
    for all strategies. The last, smaller batch of a training epoch is left out. ``validate``, ``test`` and
    ``predict`` all read ``val/``, every image exactly once, so ranks may get one batch more or less.

    Args:
        root: Folder that holds ``train`` and ``val``. Without it the bundled Fashion-MNIST subset is unpacked into a
            cache folder (``GRADSYNC_CACHE``, else the XDG cache folder) and read from there.
        batch_size: Images per training process and step.
        num_workers: Loader processes per training process, for training and validation each. Without it as many as
            the processor has room for, at most 16, and none for the bundled images.
        image_size: Height and width in pixels. 224 without it, and 32 for the bundled images.

    Attributes:
        num_classes: Number of classes; there after ``setup``, as are the following ones.
        class_names: Names of the class folders; a label is an index into it.
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
    ) -> None:
        super().__init__()
        _require(batch_size >= 1, f"--data.batch_size must be >= 1, got {batch_size}")
        _require(num_workers is None or num_workers >= 0, f"--data.num_workers must be >= 0, got {num_workers}")
        _require(image_size is None or image_size >= 1, f"--data.image_size must be >= 1, got {image_size}")
        self.is_demo = root is None
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size or (_DEMO_SIZE if self.is_demo else _IMAGENET_SIZE)
        self._train: TrainingImages | None = None
        self._val: ImageFolder | None = None

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
            self._open(bundled_image_tree() if self.root is None else self.root)
        self._check_enough_images()

    def _open(self, root: Path) -> None:
        check_tree(root)
        train, evaluate = (
            (demo_train_transform, demo_eval_transform) if self.is_demo else (train_transform, eval_transform)
        )
        # Lightning takes the seed of the samplers it injects from there, too.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        try:
            train_images = TrainingImages(root / "train", train(self.image_size), seed)
            val_images = ImageFolder(str(root / "val"), evaluate(self.image_size), loader=load_image)
        except FileNotFoundError as error:  # no class folder, or one without images
            raise UserError(f"{error}\n{_expected_tree(root)}") from error
        _check_same_classes(train_images.classes, val_images.classes, root)
        self._train, self._val = train_images, val_images
        self.class_names = train_images.classes
        self.num_classes = len(self.class_names)
        name = f"bundled {BUNDLED_NAME} (demo data, " if self.is_demo else f"{root} ("
        self.description = (
            f"{name}{self.num_classes} classes): {len(train_images)} train, {len(val_images)} val images"
            f" of {self.image_size}x{self.image_size}"
        )

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
    def train_dataloader(self) -> DataLoader[Batch]:
        assert self._train is not None, "setup() comes first"
        # Of its own and not Lightning's, because the images must know the epoch. drop_last: no image comes twice.
        sampler = EpochSampler(self._train, seed=self._train.seed, drop_last=True, **self._share())
        options = self._loader_options(drop_last=True)
        if self.trainer is None:
            return DataLoader(self._train, sampler=sampler, **options)
        return ResumableLoader(self._train, sampler=sampler, progress=self._progress, **options)

    def _progress(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        assert self._val is not None, "setup() comes first"
        # Lightning's own choice would repeat images to give all ranks the same number, and bias the accuracy.
        sampler = UnrepeatedDistributedSampler(self._val, shuffle=False, **self._share())
        return DataLoader(self._val, sampler=sampler, **self._loader_options(drop_last=False))

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def _share(self) -> dict[str, Any]:
        """Which part of the images this process reads: ``num_replicas`` and ``rank``."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return kwargs or {"num_replicas": 1, "rank": 0}

    def _loader_options(self, drop_last: bool) -> dict[str, Any]:
        num_workers = self._resolved_num_workers()
        if num_workers == 0:  # chosen on purpose
            warnings.filterwarnings("ignore", _FEW_WORKERS_WARNING, category=PossibleUserWarning)
        return {
            "batch_size": self.batch_size,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            "drop_last": drop_last,
        }

    def _resolved_num_workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        # Reading the bundled images takes a few percent of the time of training on them.
        return 0 if self.is_demo else min(_MOST_WORKERS, suggested_max_num_workers(_local_processes(self.trainer)))


def _local_processes(trainer: Any) -> int:
    return trainer.num_devices if trainer else 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _expected_tree(root: Path) -> str:
    return (
        f"Expected below --data.root:\n"
        f"  {root}/\n"
        f"    train/\n"
        f"      <class>/   one folder per class, with its images (.jpeg, .jpg, .png, ...)\n"
        f"    val/\n"
        f"      <class>/   the same class names\n"
        f"Leave --data.root out to train on the bundled demo images."
    )


def check_tree(root: Path) -> None:
    missing = [str(folder) for folder in (root, root / "train", root / "val") if not folder.is_dir()]
    if missing:
        looked = f"Looked for {root / 'train'} and {root / 'val'}."
        raise UserError(f"no such folder: {', '.join(missing)}. {looked}\n{_expected_tree(root)}")


def _check_same_classes(train: list[str], val: list[str], root: Path) -> None:
    if train != val:
        only_train, only_val = (_shortened(set(a) - set(b)) for a, b in ((train, val), (val, train)))
        raise UserError(
            f"train/ and val/ must hold the same classes. Only in train/: {only_train}. Only in val/: {only_val}.\n"
            f"{_expected_tree(root)}"
        )


def _shortened(names: set[str], most: int = 5) -> str:
    listed = ", ".join(sorted(names)[:most]) or "none"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
