"""The key files that let the processes of a run know each other: ``gradsync keygen DIR`` makes them.

CURVE, ZeroMQ's authentication and encryption: the server proves itself by its key, workers by theirs. A folder holds
``server.key`` and ``worker.key`` (public) and ``server.key_secret`` and ``worker.key_secret``, in ZeroMQ's own format.
A host that only trains needs no ``server.key_secret``, one that only serves no ``worker.key_secret``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import zmq
import zmq.auth

from .errors import UserError

ROLES = ("server", "worker")
_FLAG = "--trainer.strategy.keys"
_OTHERS = 0o077


@final
@dataclass(frozen=True)
class Keys:
    """What one process has to know. ``secret`` stays out of whatever is printed.

    Attributes:
        public: Of this process's role.
        other: The other role's public key: a worker talks to nobody but the server, and the server to workers only.
    """

    public: bytes
    secret: bytes = field(repr=False)
    other: bytes = b""


def make_keys(folder: Path) -> None:
    """Write new keys, all or nothing: files of mode 0600 in a folder of mode 0700.

    Raises:
        UserError: there is something at ``folder`` already, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"gradsync keygen: {folder} exists already and is not overwritten: name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # mode 0700
    except OSError as error:
        raise UserError(f"gradsync keygen: {folder} cannot be written: {error}") from error
    try:
        for role in ROLES:
            _write_pair(part, role)
        part.rename(folder)  # fails if somebody has put files there meanwhile
        _sync(folder.parent)
    except OSError as error:
        raise UserError(f"gradsync keygen: {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_keys(folder: Path, role: str) -> Keys:
    """What ``role`` needs: its own pair, and the other role's public key.

    Raises:
        UserError: a file is missing, malformed or open to other users.
    """
    other = ROLES[1 - ROLES.index(role)]
    public, secret = _read(folder / f"{role}.key_secret", role)
    known, _ = _read(folder / f"{other}.key", other)
    if secret is None:
        raise UserError(f"{_FLAG}: {folder / f'{role}.key_secret'} holds no secret key; {_remedy(folder)}")
    return Keys(public, secret, known)


def _read(path: Path, role: str) -> tuple[bytes, bytes | None]:
    try:
        if path.suffix == ".key_secret" and (path.stat().st_mode | path.parent.stat().st_mode) & _OTHERS:
            raise UserError(f"{_FLAG}: {path} is open to other users: chmod 700 {path.parent}; chmod 600 {path}")
        public, secret = zmq.auth.load_certificate(path)
        zmq.curve_public(secret) if secret else None
    except (OSError, ValueError, zmq.ZMQError) as error:
        why = type(error).__name__
        raise UserError(f"{_FLAG}: no key of the {role} in {path} ({why}); {_remedy(path.parent)}") from error
    return public, secret


def _remedy(folder: Path) -> str:
    return f"`gradsync keygen {folder}` makes keys where there are none"


def _write_pair(folder: Path, role: str) -> None:
    public, secret = zmq.curve_keypair()
    lines = ["curve", f'    public-key = "{public.decode()}"']
    _write(folder / f"{role}.key", lines)
    _write(folder / f"{role}.key_secret", [*lines, f'    secret-key = "{secret.decode()}"'])


def _write(path: Path, lines: list[str]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join([*lines, ""]))
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradsync keygen",
        description="Make the keys by which the parameter server and its workers know each other, for "
        "--trainer.strategy.keys DIR. Copy DIR to every host of the run, by a way that nobody else can read.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    return parser


def main(arguments: list[str]) -> None:
    """``gradsync keygen``."""
    folder = _parser().parse_args(arguments).folder
    make_keys(folder)
    print(f"the keys of the server and of its workers are in {folder}; use them by --trainer.strategy.keys {folder}")
