"""``NAME.sha256`` beside a file: which contents its writer has given it, as ``sha256sum --check`` reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import final

from .replacing import replacing


@final
class Manifest:
    """Of ``target``; one line for each content that is good."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.sha256")

    def digests(self) -> list[str]:
        """Of all good contents; none if there is no manifest."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line.partition(" ")[0] for line in lines]

    def write(self, digests: Iterable[str]) -> None:
        """Blocks until it is on the disk."""
        lines = "".join(f"{digest}  {self._target.name}\n" for digest in digests)
        with replacing(self.path, lambda file: file.write(lines.encode())):
            pass


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
