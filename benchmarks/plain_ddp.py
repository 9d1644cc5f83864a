"""What the faults of `faults.py` are compared with: a training script with Lightning's DDP, and nothing of gradsync.

    python plain_ddp.py --epochs 1

Trainer, strategy and checkpoints are Lightning's own. ``--resume`` goes on from ``last.ckpt`` where there is one.
"""

from __future__ import annotations

import argparse
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fault_models import BATCH_SIZE, FaultyMlp, TinyData, checkpoints
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=int, default=2)
    add("--epochs", type=int, default=1)
    add("--steps-per-epoch", type=int, default=20)
    add("--num-fewer", type=int, default=0, help="batches that rank 1 lacks")
    add("--images", type=Path, help="train on this image folder's train/ instead of random points")
    add("--workers", type=int, default=0, help="loader processes of each rank")
    add("--timeout-s", type=float, help="of every collective (Lightning's 1800)")
    add("--folder", type=Path, default=Path("run/checkpoints"), help="of the checkpoints (%(default)s)")
    add("--every-n-steps", type=int, help="save so often, and keep all (after every epoch)")
    add("--resume", action="store_true", help="go on from last.ckpt if there is one")
    add("--ckpt-path", type=Path, help="go on from there")
    add("--fault", default="none")
    add("--process", type=int, default=1)
    add("--at-step", type=int, default=5)
    add("--num-more", type=int, default=0)
    add("--dropout", type=float, default=0.0)
    add("--pace-s", type=float, default=0.0)
    return parser.parse_args()


def image_loader(root: Path, num_workers: int) -> DataLoader[Any]:
    """As the examples of torchvision do it."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    augment = [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(str(root / "train"), transforms.Compose(augment))
    return DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=num_workers, drop_last=True)


def main() -> None:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")  # hints about loaders and loggers
    pl.seed_everything(42, verbose=False)
    given = vars(arguments)
    model = FaultyMlp(
        num_features=3 * 32 * 32 if arguments.images else 10,
        **{name: given[name] for name in ("fault", "process", "at_step", "num_more", "dropout", "pace_s")},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=arguments.timeout_s)) if arguments.timeout_s else "ddp",
        max_epochs=arguments.epochs,
        callbacks=[checkpoints(str(arguments.folder), arguments.every_n_steps)],
        use_distributed_sampler=not arguments.num_fewer,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = arguments.folder / "last.ckpt"
    resumed = arguments.ckpt_path or (last if arguments.resume and last.is_file() else None)
    path = str(resumed) if resumed else None
    if arguments.images:
        trainer.fit(model, image_loader(arguments.images, arguments.workers), ckpt_path=path)
    else:
        trainer.fit(model, datamodule=TinyData(arguments.steps_per_epoch, arguments.num_fewer), ckpt_path=path)


if __name__ == "__main__":
    main()
