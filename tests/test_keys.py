"""``gradsync keygen``, and a parameter server that knows its workers by their keys."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import zmq
from commands import run_command
from distributed import run_distributed
from torch.utils.data import DataLoader
from training import Mlp, make_data, make_strategy, make_trainer, quiet, train

from gradsync.comm.server import ServerFailed, gate
from gradsync.comm.server.gate import MOST_SILENT
from gradsync.comm.server.ledger import identity
from gradsync.errors import UserError
from gradsync.keys import load_keys, make_keys
from gradsync.strategies import ParameterServerStrategy, server_connection
from gradsync.strategies.server_connection import ServerConnection

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
    connection = ServerConnection(dist.HashStore(), 0, 1, keys)
    try:
        with pytest.raises(UserError, match=r"--trainer.strategy.host 203.0.113.1: the server cannot listen there"):
            connection.bind(True, "203.0.113.1", 1)
    finally:
        connection.close(0)


# -- a run with strangers ------------------------------------------------------------------------------------------


class _Watched(Mlp):
    """Where the server listens becomes known by a file; the first worker waits until the strangers are through."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_start(self) -> None:
        if self.global_rank == 0:
            strategy: Any = self.trainer.strategy
            endpoint, pid = strategy._connection._endpoints[0], strategy.store.get("pid 0").decode()
            (self.folder / "part").write_text(f"{endpoint} {pid}")
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
        dealer.linger, dealer.routing_id, dealer.handshake_ivl = 0, b"7", 0
        if curve is not None:
            dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = curve
        failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
        monitor = dealer.get_monitor_socket(failures | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint)
        dealer.send_multipart([b"\x0c" + bytes(7), b'{"error": "I am a stranger"}', b""])
        assert monitor.poll(50_000), "neither refused nor accepted"
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        return "accepted" if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else "refused"
    finally:
        context.destroy(0)


def _fit_among(strangers: Callable[[], None], folder: Path, options: dict[str, Any]) -> list[Any]:
    thread = threading.Thread(target=strangers)
    thread.start()
    try:
        return run_distributed(_fit, 3, folder, options)
    finally:
        (folder / "endpoint").touch()
        thread.join()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """What a run comes to that nobody disturbs."""
    return run_distributed(train, 3, "parameter_server", 3)[0]


def _assert_equal(states: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(states[0][name], expected[name]) for name in states[0])


def _limit(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a connection may say nothing, in the ranks, which are forked; 0: for ever."""
    monkeypatch.setattr(gate, "HELLO_S", seconds or float("inf"))
    monkeypatch.setattr(server_connection, "_HANDSHAKE_MS", int(1000 * seconds))


def _strangers(folder: Path, keys: Path, results: dict[str, Any]) -> None:
    endpoint = _await(folder / "endpoint").split()[0]
    wrong = (load_keys(keys, "worker").other, *zmq.curve_keypair())
    attempts = {
        "plain": lambda: _plain_client(endpoint),
        "without keys": lambda: _zmq_client(endpoint, None),
        "with a wrong key": lambda: _zmq_client(endpoint, wrong),
    }
    try:
        for name, attempt in attempts.items():
            results[name] = attempt()
    finally:
        (folder / "done").touch()


def test_strangers_are_refused_and_training_does_not_notice(
    keys: Path, tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what they say, and at once: no limit would cut them later."""
    _limit(0, monkeypatch)
    results: dict[str, Any] = {}
    states = _fit_among(lambda: _strangers(tmp_path, keys, results), tmp_path, {**TCP, "keys": keys})
    assert results == dict.fromkeys(("plain", "without keys", "with a wrong key"), "refused")
    _assert_equal(states, expected)


def _is_open(connection: socket.socket) -> bool:
    """Reads what there is: ZeroMQ's greeting comes first."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def _silent_crowd(folder: Path, size: int, most: int, results: dict[str, Any]) -> None:
    """Connections that say nothing, until the server has cut all but ``most``; what it holds then."""
    endpoint, pid = _await(folder / "endpoint").split()
    host, _, port = endpoint.removeprefix("tcp://").partition(":")
    descriptors = Path(f"/proc/{pid}/fd")
    try:
        results["before"] = len(list(descriptors.iterdir()))
        crowd = [socket.create_connection((host, int(port)), timeout=30) for _ in range(size)]
        for connection in crowd:
            connection.setblocking(False)
        deadline = time.monotonic() + 60
        while (num_open := sum(map(_is_open, crowd))) > most and time.monotonic() < deadline:
            time.sleep(0.01)
        results["still open"] = num_open
        bound = results["before"] + most + 4
        while (num_held := len(list(descriptors.iterdir()))) > bound and time.monotonic() < deadline:
            time.sleep(0.01)  # the server's end is closed a moment later
        results["then"] = num_held
        for connection in crowd:
            connection.close()
    finally:
        (folder / "done").touch()


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(
    ("size", "limit_s", "most"), [(100, 0, MOST_SILENT), (MOST_SILENT, 1, 0)], ids=["of many the oldest", "each, soon"]
)
def test_connections_that_say_nothing_are_cut_and_training_goes_on(
    size: int, limit_s: float, most: int, with_keys: bool, keys: Path, tmp_path: Path,
    expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _limit(limit_s, monkeypatch)
    results: dict[str, Any] = {}
    options = {**TCP, "keys": keys} if with_keys else TCP
    states = _fit_among(lambda: _silent_crowd(tmp_path, size, most, results), tmp_path, options)
    assert results["still open"] == most
    assert results["then"] <= results["before"] + most + 4, results
    _assert_equal(states, expected)


def _talkative_stranger(folder: Path) -> None:
    """Speaks ZeroMQ, as nobody in particular and as a worker: without keys nothing else keeps it out."""
    endpoint = _await(folder / "endpoint").split()[0]
    context = zmq.Context()
    failed = [bytes([12, *bytes(7)]), b'{"error": "I am a stranger"}', b""]
    try:
        for name in (b"7", b"0", b"0:12345678", b"\xff"):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger, dealer.routing_id = 0, name
                monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                dealer.connect(endpoint)
                for message in (failed, [bytes(32), *failed], [b""]):
                    dealer.send_multipart(message)
                assert monitor.poll(30_000), "not cut"
                dealer.disable_monitor()
                monitor.close(0)
    finally:
        (folder / "done").touch()
        context.destroy(0)


def test_without_keys_a_stranger_cannot_speak_for_a_worker(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    _assert_equal(_fit_among(lambda: _talkative_stranger(tmp_path), tmp_path, TCP), expected)


def test_a_worker_with_other_keys_is_told_so_and_does_not_hang(keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    (tmp_path / "other" / "server.key").write_bytes((keys / "server.key").read_bytes())
    store = dist.HashStore()
    server, worker = ServerConnection(store, 0, 1, keys), ServerConnection(store, 1, 1, tmp_path / "other")
    try:
        server.bind(True, "127.0.0.1", 1)
        worker.find()
        worker.connect(identity(0))
        worker.sockets[0].send_multipart([b"hello"])
        with pytest.raises(ServerFailed, match=r"does not know this worker's key: is --trainer.strategy.keys the same"):
            worker.sockets[0].poll(30_000)
    finally:
        worker.close(30_000)
        server.close(0)


def test_secrets_are_in_no_argument_no_environment_and_no_file_of_the_run(keys: Path, tmp_path: Path) -> None:
    secrets = [load_keys(keys, role).secret.decode() for role in ("server", "worker")]
    strategy = ParameterServerStrategy(**TCP, keys=keys)
    assert strategy.options["keys"] == str(keys)
    shown = repr(vars(strategy)) + repr(strategy.options) + repr(dict(os.environ))
    assert not any(secret in shown for secret in secrets)
