"""``gradsync compare``: train under several strategies, each in a clean process, then report what each costs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import final

import torch
from rich.console import Console

from .argument_types import non_negative_int, positive_int
from .comparison_runs import ComparisonRuns, Run
from .datamodules.opening import check_root
from .errors import UserError
from .report import atomic_write_json, make_report
from .report.comparison import plural
from .report.methods import COMPARISON_FILENAME, RESULT_PATTERN
from .strategy_variant import Variant, check_variants, parse_variants

_DEFAULT_STRATEGIES = "ddp,manual_allreduce,parameter_server"
_DEMO_RECIPE = Path(__file__).parent / "configs" / "recipe" / "demo.yaml"
_DEFAULT_EPOCHS = 3
_DEFAULT_BATCH_SIZE = 64


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync compare",
        description="Train ResNet50 under several strategies, one after another, and compare what they cost. "
        "Everything after -- goes to every `gradsync fit`, e.g. -- --model.arch resnet18.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--epochs", type=positive_int, default=None, metavar="N", help="epochs of each run (default 3)")
    add("--batch-size", type=positive_int, default=None, metavar="N", help="images per process and step (default 64)")
    add("--workers", type=non_negative_int, default=None, metavar="N", help="loader processes per training process")
    add("--data-dir", default=None, metavar="DIR", help="images or Parquet shards, a folder or URL (default: demo)")
    add(
        "--backend",
        choices=["nccl", "gloo"],
        default=None,
        help="nccl: on GPUs, gloo: on CPU (default: by machine)",
    )
    add("--devices", type=_counts, default=[2], metavar="N[,N]", help="training processes; several counts are swept")
    add("--weights", default=None, metavar="FILE", help="pretrained weights: a .pth file or a torchvision name")
    add(
        "--strategies",
        type=parse_variants,
        default=parse_variants(_DEFAULT_STRATEGIES),
        metavar="A,B",
        help="names, each with options of that run only if you like: parameter_server:mode=async or "
        f"parameter_server:servers=2+transport=tcp (default {_DEFAULT_STRATEGIES})",
    )
    add("--repeats", type=positive_int, default=1, metavar="N", help="interleaved repeats of every run (default 1)")
    add("--seed", type=non_negative_int, default=42, metavar="N", help="the same for every run (default 42)")
    add("--output", type=Path, default=None, metavar="DIR", help="folder of the comparison (default: comparisons/TIME)")
    add("--demo", action="store_true", help="the settings of the demo: bundled images, minutes on 2 cores")
    return parser


def _counts(text: str) -> list[int]:
    return sorted({positive_int(part) for part in text.split(",")})


@final
@dataclass(frozen=True)
class Plan:
    """What a comparison will do, checked before anything starts."""

    options: argparse.Namespace
    extra: list[str]
    output: Path

    def fit_arguments(self, variant: Variant, num_trainers: int) -> list[str]:
        """Arguments of ``gradsync fit`` for one run, without its output paths. All runs train in as many processes."""
        o = self.options
        flags: dict[str, object] = {
            "--seed_everything": o.seed,
            "--trainer.strategy": variant.strategy,
            "--trainer.strategy.process_group_backend": o.backend,
            "--trainer.accelerator": {"nccl": "gpu", "gloo": "cpu", None: None}[o.backend],
            "--trainer.devices": num_trainers + variant.num_servers(self.extra),
            "--trainer.max_epochs": self.epochs,
            "--trainer.enable_checkpointing": "false",
            "--trainer.enable_model_summary": "false",
            "--data.batch_size": o.batch_size or (None if o.demo else _DEFAULT_BATCH_SIZE),  # the recipe has its own
            "--data.num_workers": o.workers,
            "--data.root": o.data_dir,
            "--model.weights": o.weights,
        }
        config = ["--config", str(_DEMO_RECIPE)] if o.demo else []
        given = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
        return ["fit", *config, *given, *self.extra, *variant.fit_arguments()]

    @property
    def epochs(self) -> int:
        return self.options.epochs or _DEFAULT_EPOCHS

    def runs(self) -> list[Run]:
        """Repeats outermost, so that a change of the machine's mood hits all strategies alike."""
        counts = self.options.devices
        return [
            Run(
                variant.method,
                count if len(counts) > 1 else None,
                repeat,
                self.epochs,
                self.fit_arguments(variant, count),
            )
            for repeat in range(1, self.options.repeats + 1)
            for count in counts
            for variant in self.options.strategies
        ]


def _check(options: argparse.Namespace, extra: list[str], output: Path) -> Plan:
    """Everything that can be known now is checked now, before work is lost."""
    if not options.strategies:
        raise UserError("--strategies is empty: name at least one, e.g. ddp,manual_allreduce")
    check_variants(options.strategies, extra)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is missing, and the report needs it for its plots: pip install matplotlib")
    if options.backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--backend nccl needs NVIDIA GPUs, and torch sees none here: use --backend gloo")
    if options.demo and options.data_dir is not None:
        raise UserError("--demo uses the bundled images: leave out --data-dir, or leave out --demo")
    if options.data_dir is not None:
        check_root(options.data_dir)
    weights = options.weights
    if weights is not None and weights.endswith(".pth") and not Path(weights).is_file():
        raise UserError(f"--weights: there is no file {weights}")
    if any(output.glob(RESULT_PATTERN)):
        raise UserError(f"--output {output} holds results already: name another folder, they would be lost")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"--output {output} cannot be written: permission denied")
    return Plan(options, extra, output)


def main(arguments: list[str]) -> None:
    """Run the command; leaves with code 1 if any run failed, after reporting on the others."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:at])
    output = options.output or Path("comparisons") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    plan = _check(options, arguments[at + 1 :], output)
    console = Console(highlight=False)
    runs = ComparisonRuns(plan.runs(), output, console)
    _introduce(plan, console)
    command = shlex.join(["gradsync", "compare", *arguments])
    names = [_as_asked(variant) for variant in options.strategies]
    atomic_write_json(output / COMPARISON_FILENAME, {"strategies": names, "command": command})
    failed = runs.execute()
    make_report(output, console)
    console.print(f"The same report again: gradsync report {shlex.quote(str(output))}", soft_wrap=True, markup=False)
    if failed:
        names = ", ".join(run.name for run in failed)
        raise UserError(f"{len(failed)} run(s) failed: {names}; the report is made from the others")


def _as_asked(variant: Variant) -> str:
    method = variant.method
    return f"{method.strategy}:{method.variant}" if method.variant else method.strategy


def _introduce(plan: Plan, console: Console) -> None:
    o = plan.options
    data = f"images in {o.data_dir}" if o.data_dir else "the bundled demo images (10 classes, not ImageNet)"
    counts = " and ".join(map(str, o.devices))
    servers = {variant.method.run_name: variant.num_servers(plan.extra) for variant in o.strategies}
    more = "".join(f", {plural(count, 'server')} on top for {name}" for name, count in servers.items() if count)
    console.print(
        f"Comparing {', '.join(map(_as_asked, o.strategies))} on {data}: {counts} training processes each{more}; "
        f"{len(plan.runs())} runs, one after another.\nResults go to {plan.output}",
        soft_wrap=True,
        markup=False,
    )
    sys.stdout.flush()
