"""Saving while training goes on."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch.plugins.io import AsyncCheckpointIO
from typing_extensions import override


@final
class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Lightning's, with the order kept: what a checkpoint replaces goes only when that is on the disk.

    Lightning's own removes at once (``AsyncCheckpointIO.remove_checkpoint`` is not its own, as of 2.6), and a kill
    leaves neither. An error while saving is raised by the next save, or at the end of the run.
    """

    @override
    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        assert self.checkpoint_io is not None
        self._executor.submit(self.checkpoint_io.remove_checkpoint, *args, **kwargs)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Blocks until all that was saved before is on the disk."""
        if self._executor is not None:
            self._executor.submit(lambda: None).result()
        return super().load_checkpoint(*args, **kwargs)
