"""``<split>/<class>/*``: one folder per class, one file per image."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import final

import numpy as np
from torchvision.datasets import ImageFolder
from typing_extensions import override

from .image_source import ImageSource


@final
class ImageFolderSource(ImageSource):
    """As torchvision lists it: classes and files sorted by name, links followed.

    Raises:
        FileNotFoundError: no class folder, or one without images.
    """

    def __init__(self, folder: Path) -> None:
        listed = ImageFolder(str(folder))
        self.class_names = listed.classes
        # In arrays: Python objects' reference counts, once touched, copy memory page by page into every loader worker.
        self._paths = np.array([os.fsencode(path) for path, _ in listed.samples])
        self._labels = np.array([label for _, label in listed.samples], dtype=np.int32)

    @override
    def __len__(self) -> int:
        return len(self._labels)

    @override
    def read(self, index: int) -> tuple[bytes, int]:
        with open(self._paths[index], "rb") as file:
            return file.read(), int(self._labels[index])

    @override
    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def fingerprint(self, more: str) -> str:
        """Of the files' names, sizes and labels, and of a text; other images have another one."""
        sizes = [os.stat(path).st_size for path in self._paths]
        digest = hashlib.sha256(more.encode())
        for part in (self._paths.tobytes(), np.array(sizes, dtype=np.int64).tobytes(), self._labels.tobytes()):
            digest.update(part)
        return digest.hexdigest()
