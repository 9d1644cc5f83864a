"""Any classification network of torchvision as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from ..errors import UserError
from .compiling import check_backend
from .freezing import freeze, is_frozen
from .gradient_checkpointing import checkpoint_activations
from .metrics import MeanLoss, PercentCorrect
from .networks import build_network, check_arch
from .schedules import Schedule, learning_rate_factor
from .weights import load_weights

Batch = tuple[Tensor, Tensor]


@final
class _Shared:
    """A function that copies of the module share: averaging weights copies it, the command line's cannot be copied."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@final
class ImageClassifier(LightningModule):
    """Classifies images (N, 3, H, W); a batch is (images, labels (N,)), or in training probabilities (N, num_classes).

    Logs ``train/loss`` for every step on its own rank; for every epoch and over all ranks ``train/loss_epoch``,
    ``train/top1``, ``val/loss``, ``val/top1``, ``val/top5`` and the same three of ``test/``. Accuracies are percent.

    The network is built in ``configure_model``: by the Trainer, by ``load_from_checkpoint``, or by whoever uses the
    module without them.

    Args:
        arch: Name of a torchvision classification network, such as ``resnet18`` or ``vit_b_16``.
        weights: What to start from: torchvision's name of published weights, such as ``IMAGENET1K_V2``, or a local
            file, such as ``resnet50-0676ba61.pth``. Random weights without it.
        num_classes: Number of classes. Without it the data module says it.
        label_smoothing: Share of the target that is spread over all classes, in training only.
        zero_init_residual: Start every residual block of a ResNet as the identity.
        channels_last: Keep images and weights in channels-last memory format.
        freeze: Parts that are not trained, by names with commas between them or wildcards: ``conv1,bn1,layer[12]``.
            Their BatchNorm layers keep their statistics.
        gradient_checkpointing: Compute activations twice instead of keeping them: true for the blocks of a ResNet, or
            parts by name as for ``freeze``.
        compile: Compile the network when it is first used: true for inductor, or the name of another backend of
            ``torch.compile``. Names of parameters stay as they are.
        optimizer: Optimizer of the parameters.
        decay_norms_and_biases: Whether the optimizer's weight decay holds for parameters of one dimension, too.
        reference_batch_size: Global batch size that the optimizer's learning rate is meant for: for another it is
            scaled in proportion (https://arxiv.org/abs/1706.02677). Not scaled without it.
        schedule: Factor on the learning rate at every step of the run: ``one_cycle``, ``cosine`` or ``constant``.
        warmup_epochs: Epochs in which the learning rate rises. Without it 30 % of the run for ``one_cycle``, else 0.
        lr_scheduler: A scheduler to step after every epoch, instead of ``schedule``.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        weights: str | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.1,
        zero_init_residual: bool = True,
        channels_last: bool = False,
        freeze: str | None = None,
        gradient_checkpointing: bool | str = False,
        compile: bool | str = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9, weight_decay=1e-4, fused=True
        ),
        decay_norms_and_biases: bool = True,
        reference_batch_size: int | None = None,
        schedule: Schedule = "one_cycle",
        warmup_epochs: float | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if reference_batch_size is not None and reference_batch_size < 1:
            raise UserError(f"--model.reference_batch_size must be >= 1, got {reference_batch_size}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.arch = check_arch(arch)
        self.weights = weights
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.zero_init_residual = zero_init_residual
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.freeze_patterns = freeze
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_backend = check_backend(compile)
        self.optimizer = _Shared(optimizer)
        self.decay_norms_and_biases = decay_norms_and_biases
        self.reference_batch_size = reference_batch_size
        self.schedule: Schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.lr_scheduler = lr_scheduler and _Shared(lr_scheduler)
        self.net: nn.Module | None = None
        self._frozen_norms: list[str] = []

    @override
    def configure_model(self) -> None:
        """Build the network and the accuracies, once; called on every rank before its strategy's setup."""
        if self.net is not None:
            return
        num_classes = self._find_num_classes()
        net = build_network(self.arch, num_classes, self.zero_init_residual, rescale_input=self.weights is not None)
        if self.weights is not None and (note := load_weights(net, self.arch, self.weights)):
            rank_zero_info(note)
        if self.freeze_patterns is not None:
            self._frozen_norms = freeze(net, self.freeze_patterns)
        checkpoint_activations(net, self.gradient_checkpointing)
        self.net = net.to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        if self.compile_backend is not None:  # in place: DDP, our strategies and checkpoints see the same module
            self.net.compile(backend=self.compile_backend)
        self.num_classes = self.hparams["num_classes"] = num_classes
        self.metrics = nn.ModuleDict(
            {
                "train/loss_epoch": MeanLoss(),
                "train/top1": PercentCorrect(num_classes),
                **{f"{stage}/loss": MeanLoss() for stage in ("val", "test")},
                **{f"{stage}/top{k}": PercentCorrect(num_classes, k) for stage in ("val", "test") for k in (1, 5)},
            }
        )
        self.train(self.training)

    def _find_num_classes(self) -> int:
        datamodule = getattr(self._trainer, "datamodule", None)
        in_data: int | None = getattr(datamodule, "num_classes", None)
        num_classes = self.num_classes or in_data
        if num_classes is None:
            raise UserError("--model.num_classes is needed: no data module with `num_classes` says it")
        if in_data is not None and num_classes < in_data:
            raise UserError(f"--model.num_classes must be >= {in_data}, the classes of the data, got {num_classes}")
        return num_classes

    @override
    def train(self, mode: bool = True) -> Self:
        """As ever, but for BatchNorm layers that are frozen."""
        super().train(mode)
        # By name: SyncBatchNorm takes the place of such a layer later on.
        for norm in (self.get_submodule(f"net.{name}") for name in self._frozen_norms):
            norm.train(mode and not is_frozen(norm))
        return self

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        assert self.net is not None, "configure_model() comes first"
        return self.net(images.to(memory_format=self.memory_format))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        # A mixed image counts as the class that it has most of.
        self._log_epoch("train", loss, logits, labels.argmax(1) if labels.is_floating_point() else labels)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self._log_epoch(stage, functional.cross_entropy(logits, labels), logits, labels)

    def _log_epoch(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Update the stage's metrics. Ranks are synchronized when Lightning computes them, at the end of the epoch."""
        for name, metric in self.metrics.items():
            if not name.startswith(stage):
                continue
            if isinstance(metric, MeanLoss):
                metric.update(loss.detach(), len(labels))
            else:
                assert isinstance(metric, PercentCorrect)
                metric.update(logits.detach(), labels)
            self.log(name, metric, on_step=False, on_epoch=True, prog_bar=stage == "val")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``predicted`` (N,) int64, ``probabilities`` (N, num_classes), and the batch's ``label`` (N,)."""
        images, labels = batch
        probabilities = self(images).softmax(dim=1)
        return {"predicted": probabilities.argmax(dim=1), "probabilities": probabilities, "label": labels}

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self._parameter_groups())
        if self.reference_batch_size is not None:
            factor = self._global_batch_size() / self.reference_batch_size
            for group in optimizer.param_groups:
                group["lr"] *= factor
        if self.lr_scheduler is not None:
            return LightningCLI.configure_optimizers(self, optimizer, self.lr_scheduler(optimizer))
        scheduler = LambdaLR(optimizer, self._learning_rate_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.decay_norms_and_biases:
            return trained
        decayed = [parameter for parameter in trained if parameter.ndim > 1]
        others = [parameter for parameter in trained if parameter.ndim <= 1]
        groups = {"params": decayed}, {"params": others, "weight_decay": 0.0}
        return [group for group in groups if group["params"]]

    def _global_batch_size(self) -> int:
        """Images per optimizer step of all training processes."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        batch_size: int | None = getattr(datamodule, "batch_size", None)
        if batch_size is None:
            raise UserError(
                "--model.reference_batch_size needs a data module that says its `batch_size`: leave it out, and give"
                " the learning rate for your batch"
            )
        return batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _learning_rate_factor(self) -> Callable[[int], float]:
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == math.inf and self.schedule != "constant":
            raise UserError(
                f"--model.schedule {self.schedule} needs an end: set --trainer.max_epochs or --trainer.max_steps, or"
                " choose --model.schedule constant"
            )
        warmup_steps = None
        if self.warmup_epochs is not None:
            steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
            warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return learning_rate_factor(self.schedule, total_steps, warmup_steps)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The checkpoint holds the weights: whoever loads it need not have the file that training started from.
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "weights": None}
