"""``gradsync inspect``: the model of a configuration, or the tensors of a file, without training."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .argument_types import positive_int
from .errors import UserError
from .inspect_output import Screen, print_json
from .inspection.bucket_plan import StrategyPlan, plan_strategy
from .inspection.checkpoint_file import list_file
from .inspection.entries import Listing
from .inspection.filtering import filtered
from .inspection.matching import with_checkpoint
from .inspection.sources import find_model
from .strategy_variant import parse_variants

_STRATEGIES = "ddp,manual_allreduce,sharded_server,parameter_server"
_WORLD_SIZES = "2,4,8"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync inspect",
        usage="gradsync inspect [MODEL] [options] [-- arguments of gradsync fit]",
        description="List a model's parameters without training, and where it can be without memory for them. MODEL "
        "is a network of torchvision or timm by name, a folder with a config.json or a name of Hugging Face, a YAML "
        "configuration of gradsync fit, a run's folder, or the path of a LightningModule class; torchvision:NAME, "
        "timm:NAME and hf:NAME say which. Without it: the file of --checkpoint alone, or the model of gradsync fit.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="resnet50, configs/default.yaml, a folder with config.json, ...")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a Lightning checkpoint, .pth or .safetensors, or an index of several",
    )
    add("--filter", metavar="TEXT", help="only parameters with this in their name, or a pattern such as '*.bias'")
    add("--values", action="store_true", help="mean, std, min, max and share of zeros of each")
    add("--children", action="store_true", help="the tree of modules instead of the list")
    add("--depth", type=positive_int, metavar="N", help="levels that --children shows (default 2)")
    add("--config", action="store_true", help="what the model was built with instead of the list")
    add("--buckets", action="store_true", help="how strategies would cut it, and the bytes per step")
    add(
        "--strategies", metavar="A,B:OPTION=VALUE", help=f"of --buckets, as in gradsync compare (default {_STRATEGIES})"
    )
    add(
        "--world-size",
        type=_world_sizes,
        metavar="N,M",
        help=f"training processes, for --buckets (default {_WORLD_SIZES})",
    )
    add("--json", action="store_true", help="one JSON array, one record per parameter")
    return parser


def _world_sizes(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(positive_int(part.strip()) for part in text.split(",")))
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"must be whole numbers >= 1 such as {_WORLD_SIZES}, got {text!r}") from error


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: no such model or file, a file of another model, nothing that the filter leaves, flags that do not
            go together.
    """
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, fit_arguments = _parser().parse_args(arguments[:at]), arguments[at + 1 :]
    _check(options, is_file_only=_is_file_only(options, fit_arguments))
    whole = _listing(options, fit_arguments)
    listing = filtered(whole, options.filter) if options.filter else whole
    if options.values and all(entry.load is None for entry in listing.entries):
        raise UserError("--values: nothing here has values; name a file by --checkpoint")
    plans = _plans(options, whole)
    if options.json:
        try:
            print_json(listing, options.values, plans)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough; nor may the interpreter try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        _show(options, listing, plans, len(whole.entries))


def _is_file_only(options: argparse.Namespace, fit_arguments: Sequence[str]) -> bool:
    return options.checkpoint is not None and options.model is None and not fit_arguments


def _check(options: argparse.Namespace, is_file_only: bool) -> None:
    """Raises: UserError."""
    others = [flag for flag in ("children", "config") if getattr(options, flag)]
    if options.json and others:
        raise UserError(f"--json lists parameters, and --{others[0]} shows something else: leave one of them out")
    if options.values and others and not options.json:
        raise UserError(f"--values goes with the list of parameters, not with --{others[0]}: leave one of them out")
    for flag, given in (("strategies", options.strategies), ("world-size", options.world_size)):
        if given is not None and not options.buckets:
            raise UserError(f"--{flag} is for --buckets: add that, or leave it out")
    if options.depth is not None and not options.children:
        raise UserError("--depth is for --children: add that, or leave it out")
    if options.buckets and is_file_only:
        raise UserError("--buckets needs MODEL: a file does not say what is trained")


def _listing(options: argparse.Namespace, fit_arguments: Sequence[str]) -> Listing:
    file = None if options.checkpoint is None else list_file(options.checkpoint)
    if file is not None and _is_file_only(options, fit_arguments):
        return file
    model = find_model(options.model, fit_arguments, with_values=options.values and file is None)
    if file is not None:
        model = with_checkpoint(model, file)
    if not model.entries:
        raise UserError(f"{model.title} has no parameters")
    return model


def _plans(options: argparse.Namespace, listing: Listing) -> list[StrategyPlan]:
    if not options.buckets:
        return []
    assert listing.module is not None
    variants = parse_variants(options.strategies or _STRATEGIES)
    if not variants:
        raise UserError(f"--strategies names none; wanted is something like {_STRATEGIES}")
    world_sizes = options.world_size or _world_sizes(_WORLD_SIZES)
    return [plan_strategy(listing.module, variant, world_sizes) for variant in variants]


def _show(options: argparse.Namespace, listing: Listing, plans: list[StrategyPlan], num_all: int) -> None:
    screen = Screen(Console(highlight=False))
    if options.config:
        screen.built_with(listing)
    if options.children:
        screen.tree(listing, options.depth or 2)
    if plans:
        screen.plans(plans)
    if not (options.config or options.children or plans) or options.values:
        screen.parameters(listing, options.values)
    if not options.config:
        screen.summary(listing, num_all)
