"""What compression hooks share: error feedback, and the average of the messages of all ranks.

One step of a bucket, the same for every compression:

1. *correct*: add to the gradient the error, which is what earlier steps left out (:class:`ErrorFeedback`);
2. *compress* the sum into one message of bytes; what the message does not say is the new error;
3. *gather* the messages of all ranks;
4. *average*: decompress and add them in rank order, so that all ranks get the same bits.

Error feedback: Seide et al., "1-bit stochastic gradient descent" (2014); Karimireddy et al., "Error feedback fixes
SignSGD" (2019).
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what dtype gradients of ``dtype`` are corrected, summed and their errors kept.

    Not in half precision: an error there stops growing once it is 256 times (bfloat16) the next gradient.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Errors:
    """One bucket's errors: ``flat`` has its elements, in the working dtype; ``keys`` name the parameters' parts."""

    parameters: list[Tensor]
    keys: list[str]
    flat: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        return self.flat.split([parameter.numel() for parameter in self.parameters])

    def fits(self, parameters: list[Tensor]) -> bool:
        # by identity: `==` of lists compares tensors element by element
        return len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))


@final
class ErrorFeedback:
    """What compression has left out of this rank's gradients, one flat tensor per bucket.

    An error belongs to its parameter: when DDP rebuilds its buckets (after the first step), every parameter's error
    moves to its new place. That costs one copy then; in all other steps, comparing the bucket's list of parameters.

    Args:
        named_parameters: All that buckets may hold; they name the errors in :meth:`state_dict`. Empty: errors are
            named by place, ``"<bucket index>.<position>"``, and fit only the buckets that they were saved with.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._names = {parameter: name for name, parameter in named_parameters}
        self._buckets: dict[int, _Errors] = {}
        self._moving: dict[Tensor, Tensor] = {}  # parameter to error, between two layouts
        self._loaded: dict[str, Tensor] = {}  # not yet asked for

    def correct(self, bucket: dist.GradBucket) -> Tensor:
        """Gradient plus error, 1-D, in the working dtype.

        The result is the error's own memory: from it the caller subtracts in place what it sends.
        """
        gradient, parameters = bucket.buffer(), bucket.parameters()
        errors = self._buckets.get(bucket.index())
        if errors is None or not errors.fits(parameters):
            errors = self._lay_out(bucket.index(), parameters, gradient)
        return errors.flat.add_(gradient)

    def _lay_out(self, index: int, parameters: list[Tensor], like: Tensor) -> _Errors:
        self._dissolve(index, set(parameters))
        keys = [self._key(index, position, parameter) for position, parameter in enumerate(parameters)]
        errors = _Errors(list(parameters), keys, torch.zeros_like(like, dtype=working_dtype(like.dtype)))
        for parameter, key, part in zip(parameters, keys, errors.parts(), strict=True):
            loaded = self._loaded.pop(key, None)
            old = self._moving.pop(parameter, loaded)
            if old is None:
                continue
            if old.shape != part.shape:
                raise ValueError(
                    f"the saved error {key!r} has {old.numel()} elements and its parameter has {part.numel()}: "
                    "load it with the same model and buckets, or give both states named_parameters"
                )
            part.copy_(old)
        self._buckets[index] = errors
        return errors

    def _dissolve(self, index: int, parameters: set[Tensor]) -> None:
        """Set free the errors of bucket ``index`` and of all that held one of ``parameters``."""
        for other, errors in list(self._buckets.items()):
            if other == index or not parameters.isdisjoint(errors.parameters):
                self._moving.update(zip(errors.parameters, errors.parts(), strict=True))
                del self._buckets[other]

    def _key(self, index: int, position: int, parameter: Tensor) -> str:
        if not self._names:
            return f"{index}.{position}"
        if parameter not in self._names:
            shape = "x".join(map(str, parameter.shape))
            raise ValueError(f"named_parameters must name every parameter, and lacks one of shape {shape}")
        return self._names[parameter]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every parameter's error, flat. Between two backward passes only."""
        errors = dict(self._loaded)
        for bucket in self._buckets.values():
            errors.update((key, part.clone()) for key, part in zip(bucket.keys, bucket.parts(), strict=True))
        return errors

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Forget all errors; take each of these when its parameter's bucket first comes."""
        self._buckets.clear()
        self._moving.clear()
        self._loaded = {key: error.clone() for key, error in state_dict.items()}


class CompressionState(ABC):
    """What a compression hook keeps on one rank. Every rank saves and loads its own.

    Args:
        process_group: Whose ranks average; None: the default group, which must exist when the first bucket comes.
        error_feedback: Whether what a step leaves out is sent with later ones. Without it that is lost.
        named_parameters: Such as ``model.named_parameters()``. Needed to continue from a saved state where buckets
            are cut anew, as DistributedDataParallel does; not needed where the same buckets come back.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        error_feedback: bool,
        named_parameters: Iterable[tuple[str, Tensor]],
    ) -> None:
        self.process_group = process_group
        self.error_feedback = error_feedback
        self._errors = ErrorFeedback(named_parameters)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.process_group)

    @abstractmethod
    def message_bytes(self, gradient: Tensor) -> int:
        """The size of the message that says what ``gradient`` is."""

    def num_bytes(self, bucket: dist.GradBucket) -> int:
        """Bytes that this rank sends plus those it receives for ``bucket``.

        The model is a ring all-gather: ``world_size - 1`` messages go out, and as many come in.
        """
        return 2 * (self.world_size - 1) * self.message_bytes(bucket.buffer())

    def correct(self, bucket: dist.GradBucket) -> Tensor:
        """The tensor to compress, 1-D, in the working dtype. The caller leaves in it what it does not send."""
        if self.error_feedback:
            return self._errors.correct(bucket)
        return bucket.buffer().to(working_dtype(bucket.buffer().dtype))

    def state_dict(self) -> dict[str, Any]:
        """A copy of this rank's state, of tensors, ints and strings. Between two backward passes only."""
        return {"rank": self.rank, "world_size": self.world_size, "errors": self._errors.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if never stopped: the same gradients give the same bits.

        Raises:
            ValueError: if another rank, or a rank of a world of another size, saved it.
        """
        saved, wanted = (state_dict["rank"], state_dict["world_size"]), (self.rank, self.world_size)
        if saved != wanted:
            raise ValueError(
                f"rank {wanted[0]} of {wanted[1]} got the state that rank {saved[0]} of {saved[1]} saved: "
                "load every rank's own, or begin with a new state"
            )
        self._errors.load_state_dict(state_dict["errors"])


def average_messages(
    state: CompressionState, gradient: Tensor, message: Tensor, add_all: Callable[[Tensor, Tensor], None]
) -> Future[Tensor]:
    """All-gather ``message`` (uint8, of one size on all ranks); the future holds ``gradient``, by then the average.

    Args:
        add_all: ``add_all(total, messages)`` adds to ``total`` (zeros of the working dtype, in the shape of
            ``gradient``) every rank's message, decompressed and divided by the world size, in the order of
            ``messages``, a row each. Called in any thread.
    """
    world_size = state.world_size
    gathered = message.new_empty(world_size * message.numel())
    # torch 2.14 has renamed it; the old name can go when that is the oldest torch we support
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Any = all_gather(gathered, message, group=state.process_group, async_op=True)

    def average(future: Future[Any]) -> Tensor:
        future.value()  # raises what the collective did
        dtype = working_dtype(gradient.dtype)
        total = gradient.zero_() if gradient.dtype == dtype else torch.zeros_like(gradient, dtype=dtype)
        add_all(total, gathered.view(world_size, -1))
        return total if total is gradient else gradient.copy_(total)

    return work.get_future().then(average)
