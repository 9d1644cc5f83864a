"""TensorBoard in a real browser: the runs of a comparison side by side, under the charts that we lay out."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, num_processes, quiet

from gradsync.callbacks import CommunicationMonitor, Dashboard, RunSummary

STRATEGIES = ("ddp", "manual_allreduce", "parameter_server")
_PATIENCE_S = 240
_TEXT_OF_THE_PAGE = """
    const texts = [];
    const visit = node => {
        if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
        if (node.shadowRoot) visit(node.shadowRoot);
        node.childNodes.forEach(visit);
    };
    visit(document.body);
    return texts.join("\\n");
"""
"""TensorBoard's elements keep their content to themselves, in shadow roots."""

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs Debian's packages chromium and chromium-driver; .ci/run installs them",
)


def _fit(rank: int, folder: Path, strategy: str, devices: int) -> None:
    quiet()
    logger = TensorBoardLogger(folder, name=None, version=strategy, default_hp_metric=False)
    callbacks = [CommunicationMonitor(warmup_steps=1), Dashboard(), RunSummary()]
    made = make_strategy(strategy)
    trainer = make_trainer(made, devices, logger=logger, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(Mlp(), DataLoader(make_data(), batch_size=8))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a TensorBoard that serves one run of every strategy."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in STRATEGIES:
        processes = num_processes(strategy, 2)
        run_distributed(_fit, processes, folder, strategy, processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=1500,3000"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _wait_for(browser: Any, address: str, wanted: list[str]) -> str:
    """Open ``address``, again and again until TensorBoard is up; the page's text once all of ``wanted`` is there."""
    from selenium.common.exceptions import WebDriverException

    text, deadline = "", time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            browser.get("about:blank")
            browser.get(address)
        except WebDriverException:
            time.sleep(0.5)
            continue
        for _ in range(20):
            text = browser.execute_script(_TEXT_OF_THE_PAGE)
            if all(part in text for part in wanted):
                return text
            time.sleep(0.5)
    return text


def test_charts_and_runs_are_on_the_dashboard(url: str, browser: Any) -> None:
    wanted = ["Communication", "comm/exposed_ms", "perf/images_per_s", "system/rss_mib", *STRATEGIES]
    text = _wait_for(browser, f"{url}/#custom_scalars", [*wanted, "Matches (3)"])
    assert [part for part in wanted if part not in text] == []
    assert "Matches (3)" in text, "no chart has all three runs"


def test_runs_stand_side_by_side_among_the_hparams(url: str, browser: Any) -> None:
    wanted = ["learning_rate", "summary/images_per_s", *STRATEGIES]
    text = _wait_for(browser, f"{url}/#hparams", wanted)
    assert [part for part in wanted if part not in text] == []
