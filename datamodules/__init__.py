"""What it is trained on: LightningDataModules."""

from .imagenet import ImageNetDataModule

__all__ = ["ImageNetDataModule"]
