"""Every strategy with every tool of training: equal to DDP, or refused. The page of the docs is what this run found."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, final

import pytest
import torch
from distributed import RankFailed, run_distributed
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, StochasticWeightAveraging
from training import num_processes, train, train_classifier, trainers_only

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
MARKS = ("<!-- compatibility:begin -->\n", "<!-- compatibility:end -->")
STRATEGIES = ("manual_allreduce", "sharded_server", "parameter_server")
WORLD_SIZE = 2

WITHIN = {("sharded_server", "clipping the norm"): 1e-6}
"""The norm over all gradients is that of the shards' norms: the same number, rounded in another order."""


@final
@dataclass(frozen=True)
class Tool:
    """A row: what is set for the model and for the Trainer. Callbacks by name, because each process makes its own."""

    flag: str
    model: dict[str, Any] | str = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[str, ...] = ()


CALLBACKS = {
    "scheduler": lambda: GradientAccumulationScheduler({0: 2}),
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
}
TOOLS = {
    "nothing": Tool(""),
    "accumulation": Tool("`--trainer.accumulate_grad_batches 2`", trainer={"accumulate_grad_batches": 2}),
    "accumulation by epoch": Tool("`GradientAccumulationScheduler`", callbacks=("scheduler",)),
    "freezing": Tool("`--model.freeze conv1,bn1,layer1`", {"freeze": "conv1,bn1,layer1"}),
    "gradient checkpointing": Tool("`--model.gradient_checkpointing true`", {"gradient_checkpointing": True}),
    "compiling": Tool("`--model.compile aot_eager`", {"compile": "aot_eager"}),
    "channels last": Tool("`--model.channels_last true`", {"channels_last": True}),
    "bfloat16, mixed": Tool("`--trainer.precision bf16-mixed`", trainer={"precision": "bf16-mixed"}),
    "bfloat16": Tool("`--trainer.precision bf16-true`", trainer={"precision": "bf16-true"}),
    "clipping the norm": Tool("`--trainer.gradient_clip_val 0.1`", trainer={"gradient_clip_val": 0.1}),
    "clipping values": Tool(
        "`--trainer.gradient_clip_algorithm value`",
        trainer={"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    ),
    "averaged weights": Tool("`EMAWeightAveraging`", callbacks=("ema",)),
    "averaged weights of epochs": Tool(
        "`StochasticWeightAveraging`",
        trainer={"max_steps": -1, "max_epochs": 3, "limit_train_batches": 1},
        callbacks=("swa",),
    ),
    "two optimizers": Tool("manual optimization", "two_optimizers", {"max_steps": 3}),
}


SAME_WEIGHTS = ("gradient checkpointing", "compiling", "channels last", "averaged weights", "two optimizers")
"""Another network, or meant to change no weights of a run without validation. Tried elsewhere."""


def fit(rank: int, strategy: str, processes: int, name: str) -> dict[str, torch.Tensor]:
    tool = TOOLS[name]
    trainer = {**tool.trainer, "callbacks": [CALLBACKS[callback]() for callback in tool.callbacks]}
    if isinstance(tool.model, str):
        return train(rank, strategy, processes, tool.model, trainer)
    return train_classifier(rank, strategy, processes, tool.model, trainer)[0]


def fitted(strategy: str, tool: str) -> list[dict[str, torch.Tensor]] | str:
    """Weights of the training ranks, or the sentence that refused to train."""
    processes = num_processes(strategy, WORLD_SIZE)
    try:
        return trainers_only(strategy, run_distributed(fit, processes, strategy, processes, tool))
    except RankFailed as error:
        refused = re.search(r"UserError: (.*)", str(error))
        if refused is None:
            raise
        return refused[1]


@lru_cache(maxsize=1)  # tests of one tool follow each other; all weights would be gigabytes, copied with every fork
def reference(tool: str) -> list[dict[str, torch.Tensor]]:
    """DDP's."""
    found = fitted("ddp", tool)
    assert isinstance(found, list)
    values = (value.float().numpy().tobytes() for value in found[0].values())
    DIGESTS[tool] = hashlib.sha256(b"".join(values)).hexdigest()
    return found


DIGESTS: dict[str, str] = {}
"""Of rank 0's weights under DDP, by tool."""


@cache
def cell(strategy: str, tool: str) -> str:
    """What the table says."""
    ours = fitted(strategy, tool)
    if isinstance(ours, str):
        return f"refused: {ours}"
    atol = WITHIN.get((strategy, tool), 0.0)
    for rank, (a, b) in enumerate(zip(ours, reference(tool), strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=f"rank {rank}: {name}")
    return f"within {atol:g}" if atol else "equal"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tool", TOOLS)
def test_equal_to_ddp_or_refused(strategy: str, tool: str) -> None:
    assert re.fullmatch(r"equal|within 1e-06|refused: --trainer\..+", cell(strategy, tool))


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in ("nothing", *SAME_WEIGHTS)])
def test_a_tool_does_something(tool: str) -> None:
    """Else two runs would be equal for nothing."""
    for name in {"nothing", tool} - DIGESTS.keys():
        reference(name)
    assert DIGESTS[tool] != DIGESTS["nothing"]


def test_the_page_shows_what_was_found() -> None:
    """Written anew where it differs: look at it, and commit it."""
    head = f"| | by | {' | '.join(f'`{name}`' for name in STRATEGIES)} |"
    rows = [
        f"| {name} | {tool.flag} | {' | '.join(cell(s, name) for s in STRATEGIES)} |" for name, tool in TOOLS.items()
    ]
    table = "\n".join([head, "|---" * (2 + len(STRATEGIES)) + "|", *rows]) + "\n"
    before, begin, rest = PAGE.read_text().partition(MARKS[0])
    shown, end, after = rest.partition(MARKS[1])
    assert begin
    assert end
    if shown != table:
        PAGE.write_text(f"{before}{begin}{table}{end}{after}")
    assert shown == table
