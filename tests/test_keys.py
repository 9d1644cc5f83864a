"""``gradsync keygen``, and a parameter server that knows its workers by their keys."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zmq
from commands import run_command
from distributed import run_distributed
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet, train

from gradsync.errors import UserError
from gradsync.keys import load_keys, make_keys
from gradsync.strategies import ParameterServerStrategy

TCP = {"transport": "tcp"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_private_and_belong_to_each_other(keys: Path) -> None:
    assert _mode(keys) == 0o700
    files = sorted(keys.iterdir())
    assert [f.name for f in files] == ["server.key", "server.key_secret", "worker.key", "worker.key_secret"]
    assert {_mode(f) for f in files} == {0o600}
    server, worker = load_keys(keys, "server"), load_keys(keys, "worker")
    assert (server.other, worker.other) == (worker.public, server.public)
    assert zmq.curve_public(server.secret) == server.public != worker.public
    assert server.secret.decode() not in repr(server)


def test_keys_are_never_overwritten_and_a_failed_attempt_leaves_nothing(keys: Path) -> None:
    before = {f.name: f.read_bytes() for f in keys.iterdir()}
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        make_keys(keys)
    assert {f.name: f.read_bytes() for f in keys.iterdir()} == before
    assert list(keys.parent.iterdir()) == [keys]


def test_the_command_makes_keys_and_prints_none(tmp_path: Path) -> None:
    made, again = (run_command([sys.executable, "-m", "gradsync", "keygen", "keys"], tmp_path) for _ in range(2))
    assert made.code == 0, made.output
    assert again.code == 1
    assert "exists already and is not overwritten" in again.output
    for role in ("server", "worker"):
        found = load_keys(tmp_path / "keys", role)
        assert found.secret.decode() not in made.output + again.output


@pytest.mark.parametrize("role", ["server", "worker"])
def test_unusable_keys_are_named_with_the_remedy(keys: Path, role: str) -> None:
    secret = keys / f"{role}.key_secret"
    secret.chmod(0o640)
    with pytest.raises(UserError, match=r"key_secret is open to other users: chmod 700 .*; chmod 600"):
        load_keys(keys, role)
    secret.write_text('curve\n    public-key = "short"\n    secret-key = "short"\n')
    secret.chmod(0o600)
    with pytest.raises(UserError, match=r"no key of the .*`gradsync keygen .*` makes keys"):
        load_keys(keys, role)
    secret.unlink()
    with pytest.raises(UserError, match=rf"--trainer.strategy.keys: no key of the {role} in .*{role}.key_secret"):
        load_keys(keys, role)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({**TCP, "host": "10.0.0.1"}, r"make some with `gradsync keygen DIR`, and give --trainer.strategy.keys DIR"),
        ({"host": "10.0.0.1"}, "--trainer.strategy.host 10.0.0.1 needs --trainer.strategy.transport tcp"),
        ({"keys": "keys"}, "--trainer.strategy.keys are for --trainer.strategy.transport tcp, got auto"),
        ({**TCP, "host": "0.0.0.0", "keys": "keys"}, "must be one address, which the workers connect to"),
        ({**TCP, "host": "here"}, "must be an IPv4 address of this machine, got 'here'"),
    ],
)
def test_options_that_would_open_the_server_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ParameterServerStrategy(**options)


def test_an_address_of_another_machine_is_refused_by_name(keys: Path) -> None:
    with pytest.raises(AssertionError, match=r"--trainer.strategy.host 203.0.113.1: the server cannot listen there"):
        run_distributed(train, 1 + 1, "parameter_server", 2, {}, {}, {**TCP, "host": "203.0.113.1", "keys": keys})


# -- a run with strangers ------------------------------------------------------------------------------------------


class _Watched(Mlp):
    """Where the server listens becomes known by a file; the first worker waits until the strangers are through."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_start(self) -> None:
        if self.global_rank == 0:
            endpoint = self.trainer.strategy._connection._endpoints[0]  # pyright: ignore
            (self.folder / "part").write_text(endpoint)
            (self.folder / "part").rename(self.folder / "endpoint")

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == 5:
            _await(self.folder / "done")
        return super().training_step(batch, index)


def _await(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return path.read_text()


def _fit(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    quiet()
    pl.seed_everything(1, verbose=False)
    module = _Watched(folder)
    make_trainer(make_strategy("parameter_server", options), 3).fit(module, DataLoader(make_data(), batch_size=8))
    return module.state_dict()


def _plain_client(endpoint: str) -> str:
    """A foreign program: speaks, and is hung up on."""
    host, _, port = endpoint.removeprefix("tcp://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n" * 4)
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass
    return "refused"


def _zmq_client(endpoint: str, curve: tuple[bytes, bytes, bytes] | None) -> str:
    """Says that it has failed, which would end the run if it were heard."""
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.linger, dealer.routing_id = 0, b"7"
        if curve is not None:
            dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = curve
        failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
        monitor = dealer.get_monitor_socket(failures | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint)
        dealer.send_multipart([b"\x0c" + bytes(7), b'{"error": "I am a stranger"}', b""])
        assert monitor.poll(30_000), "neither refused nor accepted"
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        return "accepted" if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else "refused"
    finally:
        context.destroy(0)


def _strangers(folder: Path, keys: Path, results: dict[str, Any]) -> None:
    endpoint = _await(folder / "endpoint")
    wrong = (load_keys(keys, "worker").other, *zmq.curve_keypair())
    attempts = {
        "plain": lambda: _plain_client(endpoint),
        "without keys": lambda: _zmq_client(endpoint, None),
        "with a wrong key": lambda: _zmq_client(endpoint, wrong),
    }
    try:
        for name, attempt in attempts.items():
            start = time.monotonic()
            results[name] = (attempt(), time.monotonic() - start)
    finally:
        (folder / "done").touch()


def test_strangers_are_refused_and_training_does_not_notice(keys: Path, tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    thread = threading.Thread(target=_strangers, args=(tmp_path, keys, results))
    thread.start()
    try:
        states = run_distributed(_fit, 3, tmp_path, {**TCP, "keys": keys})
    finally:
        (tmp_path / "endpoint").touch()
        thread.join()
    assert {name: how for name, (how, _) in results.items()} == dict.fromkeys(
        ("plain", "without keys", "with a wrong key"), "refused"
    )
    assert all(seconds < 5 for _, seconds in results.values()), results  # 1 s on a quiet machine
    expected = run_distributed(train, 3, "parameter_server", 3)
    assert all(torch.equal(states[0][name], expected[0][name]) for name in states[0])


def test_secrets_are_in_no_argument_no_environment_and_no_file_of_the_run(keys: Path, tmp_path: Path) -> None:
    secrets = [load_keys(keys, role).secret.decode() for role in ("server", "worker")]
    strategy = ParameterServerStrategy(**TCP, keys=keys)
    assert strategy.options["keys"] == str(keys)
    shown = repr(vars(strategy)) + repr(strategy.options) + repr(dict(os.environ))
    assert not any(secret in shown for secret in secrets)
