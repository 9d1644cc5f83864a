"""``gradsync report DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import make_report


def main(arguments: list[str]) -> None:
    """Print tables, write plots and text for the results in a folder."""
    parser = argparse.ArgumentParser(
        prog="gradsync report",
        description="Make tables, plots and a text report from the results_*.json of a folder.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `gradsync compare --output DIR` wrote")
    make_report(parser.parse_args(arguments).folder)
