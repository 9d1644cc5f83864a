"""What is installed is the whole package and nothing else, whatever the checkout's folder is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from commands import run_command

ROOT = Path(__file__).parents[1]


def _tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are not known")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree's files, copied into a folder with a blank in its name."""
    folder = tmp_path_factory.mktemp("clone") / "a b"
    for name in _tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    outside = ("tests/", "benchmarks/", "docs/", ".")
    endings = (".py", ".yaml", ".npz", ".json", ".css")
    package = {
        f"gradsync/{name}"
        for name in _tracked()
        if not name.startswith(outside)
        and (name.endswith(endings) or name in ("py.typed", "datamodules/bundled/LICENSE"))
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == package


def test_every_folder_with_code_is_a_declared_package() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    outside = {"tests", "benchmarks", "docs"}
    folders = {Path(name).parent for name in _tracked() if name.endswith(".py")}
    found = {".".join(["gradsync", *folder.parts]) for folder in folders if not outside & set(folder.parts[:1])}
    assert found == declared


def test_an_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Import, registration by name and the bundled images, without the checkout."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import gradsync, lightning.pytorch as pl\n"
        "assert gradsync.__file__.startswith(sys.argv[1]), gradsync.__file__\n"
        "trainer = pl.Trainer(strategy='manual_allreduce', accelerator='cpu', devices=2, logger=False)\n"
        "assert type(trainer.strategy) is gradsync.ManualAllReduceStrategy\n"
        "from gradsync.datamodules import ImageNetDataModule\n"
        "data = ImageNetDataModule(); data.prepare_data(); data.setup()\n"
        "assert data.num_classes == 10\n"
    )
    env_cache = os.environ.get("GRADSYNC_CACHE")
    os.environ["GRADSYNC_CACHE"] = str(tmp_path / "cache")
    try:
        ended = run_command([sys.executable, "-W", "ignore", "-c", script, str(site)], elsewhere)
    finally:
        os.environ.pop("GRADSYNC_CACHE") if env_cache is None else os.environ.update(GRADSYNC_CACHE=env_cache)
    assert ended.code == 0, ended.output


@pytest.mark.parametrize("start", [["-m", "gradsync"], ["cli.py"]], ids=["module", "file"])
def test_every_way_to_start_the_command(start: list[str], checkout: Path, tmp_path: Path) -> None:
    script = [str(checkout / part) if part.endswith(".py") else part for part in start]
    ended = run_command([sys.executable, *script, "--help"], tmp_path)
    assert ended.code == 0, ended.output
    assert "compare" in ended.output


def test_the_installed_command_has_the_same_version(tmp_path: Path) -> None:
    ended = run_command([str(Path(sys.executable).with_name("gradsync")), "--version"], tmp_path)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ended.output.strip() == f"gradsync {version}"
