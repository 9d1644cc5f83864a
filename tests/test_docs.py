"""What the documentation says works: its commands run, its flags parse, its links lead somewhere, its example holds.

A fenced ``bash`` block runs in a folder that looks like the root of a checkout, all blocks of a page in order. A
comment right before a block changes that: ``<!-- not run: REASON -->``, or ``<!-- parsed only: REASON -->`` where the
flags of its gradsync commands are checked but nothing is trained. A ``python``, ``yaml`` or ``diff`` block whose first
line is a comment with a file name becomes that file (a diff: the file after the change); other Python blocks run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run_command
from distributed import run_distributed
from lightning.pytorch.strategies import StrategyRegistry
from training import train

import gradsync
from gradsync.compare import _parser as compare_parser
from gradsync.convert import _parser as convert_parser
from gradsync.doctor import _parser as doctor_parser
from gradsync.inspect_model import _parser as inspect_parser
from gradsync.keys import _parser as keygen_parser
from gradsync.lightning_cli import GradsyncCLI
from gradsync.strategy_flag import expand
from gradsync.tune_batch_size import _parser as tune_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONFIGS = ROOT / "configs"
OWN_PARSERS = {
    "compare": compare_parser,
    "convert": convert_parser,
    "doctor": doctor_parser,
    "inspect": inspect_parser,
    "keygen": keygen_parser,
    "tune-batch-size": tune_parser,
}
LANGUAGES = {"bash", "python", "yaml", "diff", "text"}

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|parsed only): (.*) -->\n$")
_FILENAME = re.compile(r"^[ +]?# (\S+\.(?:py|yaml))\n")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_SHORTEST_REASON = 15


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None
    """``not run`` or ``parsed only``."""
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def filename(self) -> str | None:
        found = _FILENAME.match(self.text)
        return found.group(1) if found else None

    @property
    def content(self) -> str:
        """The file that the block stands for."""
        if self.language != "diff":
            return self.text
        return "".join(line[1:] for line in self.text.splitlines(keepends=True) if not line.startswith("-"))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark = _MARK.search(before)
        name, reason = mark.groups() if mark else (None, "")
        blocks.append(Block(page, before.count("\n") + 1, fence.group(1), fence.group(2), name, reason))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _write_files(page: Path, folder: Path) -> None:
    """What a page expects in the current folder: the checkout's own files, and those that its blocks show."""
    for name in ("configs", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for block in blocks_of(page):
        if block.filename:
            (folder / block.filename).write_text(block.content)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# -- commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_known_kind_and_no_reason_is_missing(block: Block) -> None:
    assert block.language in LANGUAGES, "another language would hide commands from this test"
    assert block.mark is None or len(block.reason) >= _SHORTEST_REASON, "say why it does not run"


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_no_mark_is_without_a_block(page: Path) -> None:
    marks = len(re.findall(r"<!-- (?:not run|parsed only)", page.read_text()))
    assert marks == sum(block.mark is not None for block in blocks_of(page))


def _runs(block: Block) -> bool:
    return block.mark is None and (block.language == "bash" or (block.language == "python" and not block.filename))


@pytest.mark.timeout(3600)  # many starts, on a machine that may be busy
@pytest.mark.parametrize("page", [p for p in PAGES if any(map(_runs, blocks_of(p)))], ids=_relative)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GRADSYNC_CACHE", str(cache))
    _write_files(page, tmp_path)
    for block in filter(_runs, blocks_of(page)):
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        ended = run_command(shell if block.language == "bash" else [sys.executable, "-c", block.text], tmp_path, 850)
        assert ended.code == 0, f"{block}\n{block.text}\n{ended.output}"
        assert not ended.orphans, f"{block} left {ended.orphans}"


def _commands(text: str) -> list[list[str]]:
    """Arguments of every gradsync command, whatever starts it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert "gradsync" in words, f"only gradsync commands can be parsed, got: {line}"
        found.append(words[words.index("gradsync") + 1 :])
    return found


def _printed_config(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``gradsync ARGUMENTS`` would run, by its own ``--print_config``, in this process."""
    monkeypatch.setattr(sys, "argv", ["gradsync", *expand([*arguments, "--print_config"])])
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        GradsyncCLI.from_command_line()
    assert not ended.value.code
    return yaml.safe_load(output.getvalue())


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "parsed only"], ids=str)
def test_flags_that_are_only_shown_parse(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.language == "bash"
    _write_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command, *arguments in _commands(block.text):
        if command in OWN_PARSERS:
            at = arguments.index("--") if "--" in arguments else len(arguments)
            OWN_PARSERS[command]().parse_args(arguments[:at])
        else:
            assert _printed_config([command, *arguments], monkeypatch)["model"]


# -- configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=_relative)
def test_a_configuration_parses_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _printed_config(["fit", "--config", str(path)], monkeypatch)["trainer"]


def _pairs() -> list[tuple[Path, Path]]:
    return list(itertools.product(sorted((CONFIGS / "strategy").iterdir()), sorted((CONFIGS / "data").iterdir())))


@pytest.mark.parametrize(("strategy", "data"), _pairs(), ids=lambda path: path.stem)
def test_configurations_compose(strategy: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps what it says, and a flag overrides both."""
    configs = [part for path in (CONFIGS / "default.yaml", data, strategy) for part in ("--config", str(path))]
    options = ["--trainer.strategy.process_group_backend", "gloo", "--data.batch_size", "7"]
    merged = _printed_config(["fit", *configs, *options], monkeypatch)
    wanted_strategy = yaml.safe_load(strategy.read_text())["trainer"]["strategy"]
    wanted_data = yaml.safe_load(data.read_text())["data"]
    assert merged["trainer"]["strategy"]["class_path"] == wanted_strategy["class_path"]
    given = {**wanted_strategy.get("init_args", {}), "process_group_backend": "gloo"}
    assert merged["trainer"]["strategy"]["init_args"].items() >= given.items()
    assert merged["data"]["class_path"] == wanted_data["class_path"]
    assert merged["data"]["init_args"].items() >= {**wanted_data["init_args"], "batch_size": 7}.items()


def test_a_configuration_of_a_strategy_is_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted((CONFIGS / "strategy").iterdir()):
        some_option = ["--trainer.strategy.process_group_backend", "gloo"]
        by_name = _printed_config(["fit", "--trainer.strategy", path.stem, *some_option], monkeypatch)
        by_file = _printed_config(["fit", "--config", str(path), *some_option], monkeypatch)
        assert by_name["trainer"]["strategy"]["init_args"] == by_file["trainer"]["strategy"]["init_args"]


def test_the_default_configuration_is_what_runs_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _printed_config(["fit", "--config", str(CONFIGS / "default.yaml")], monkeypatch)
    assert default == _printed_config(["fit"], monkeypatch)


# -- pages ---------------------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    text = _FENCE.sub("", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_links_lead_to_something_that_is_there(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index_and_every_picture_is_shown() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {name for name in pages if f"({name})" in index}
    shown = "".join(page.read_text() for page in PAGES)
    assert all(f"images/{picture.name}" in shown for picture in (ROOT / "docs" / "images").iterdir())


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


def test_every_option_of_a_strategy_is_described() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text()
    inherited = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
    for path in sorted((CONFIGS / "strategy").iterdir()):
        if path.stem in gradsync.STRATEGIES:
            cls = gradsync.STRATEGIES[path.stem]
            names = {n for c in cls.__mro__[:2] for n in c.__init__.__annotations__} - {"return", "kwargs", *inherited}
            assert names
            assert all(f"| `{name}` |" in page for name in names)


# -- the worked example --------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the page on writing a strategy shows, registered under its name."""
    _write_files(ROOT / "docs" / "writing-a-strategy.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("float16_allreduce")
    monkeypatch.setitem(gradsync.STRATEGIES, "float16_allreduce", module.Float16AllReduceStrategy)
    yield module
    del sys.modules["float16_allreduce"]
    StrategyRegistry.remove("float16_allreduce")


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"batch_norm": True}, {"accumulate_grad_batches": 3}),
    ({"frozen": True}, {"gradient_clip_val": 0.1}),
]


@pytest.mark.parametrize(("model", "trainer"), CASES, ids=["plain", "accumulation", "clipping"])
def test_the_example_is_exact_without_its_rounding(
    example: Any, model: dict[str, Any], trainer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "half", lambda tensor: tensor)
    ours = run_distributed(train, 2, "float16_allreduce", 2, model, trainer)
    reference = run_distributed(train, 2, "ddp", 2, model, trainer)
    for mine, theirs in zip(ours, reference, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_ranks_of_the_example_agree_and_rounding_changes_little(example: Any) -> None:
    first, second = run_distributed(train, 2, "float16_allreduce", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    reference = run_distributed(train, 2, "ddp", 2)[0]
    assert any(not torch.equal(first[name], reference[name]) for name in first)
    for name, value in reference.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-2)


def test_the_example_is_known_to_lightning_by_its_name(example: Any) -> None:
    assert isinstance(StrategyRegistry.get("float16_allreduce"), example.Float16AllReduceStrategy)
