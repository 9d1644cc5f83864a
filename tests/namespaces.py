"""Two hosts on this machine: namespaces of their own, joined by a switch whose ports can be slowed down and pulled.

A host has its own network, host name, process numbers and ``/proc``, as a container has; only the file system is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import final

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-a", "node-b")
INTERFACE = "cable"
_SWITCH = "switch"
_KINDS = {"mnt": 0x00020000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000}


@final
class TwoHosts:
    """As long as the context manager :func:`two_hosts` lasts."""

    def __init__(self, hosts: list[int], switch: int) -> None:
        self._hosts = hosts
        """A process in each host's namespaces."""
        self._switch = switch
        for host, pid in enumerate(hosts):
            port = f"port{host}"
            _run(
                "ip",
                "link",
                "add",
                port,
                "netns",
                str(switch),
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                str(pid),
            )
            self._in_switch("ip", "link", "set", port, "up", "master", _SWITCH)
            for command in (
                ("hostname", NAMES[host]),
                ("ip", "link", "set", "lo", "up"),
                ("ip", "address", "add", f"{ADDRESSES[host]}/24", "dev", INTERFACE),
                ("ip", "link", "set", INTERFACE, "up"),
            ):
                _run(*self.command(host, *command))

    def command(self, host: int, *command: str) -> list[str]:
        """``command``, to be run on ``host``."""
        return ["nsenter", "--all", f"--target={self._hosts[host]}", f"--wd={os.getcwd()}", "--", *command]

    def enter(self, host: int) -> None:
        """Move this process, which has just been forked, to ``host``; it goes on in a child with a number of that."""
        libc = ctypes.CDLL(None, use_errno=True)
        descriptors = {kind: os.open(f"/proc/{self._hosts[host]}/ns/{kind}", os.O_RDONLY) for kind in _KINDS}
        here = os.getcwd()
        for kind, descriptor in descriptors.items():
            if libc.setns(descriptor, _KINDS[kind]):
                raise OSError(ctypes.get_errno(), f"cannot enter the host's {kind} namespace")
            os.close(descriptor)
        os.chdir(here)
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)

    def cut(self) -> None:
        """Pull the cable between the hosts; neither is told, their interfaces stay up."""
        self._in_switch("ip", "link", "set", "port1", "nomaster")

    def heal(self) -> None:
        self._in_switch("ip", "link", "set", "port1", "master", _SWITCH)

    def limit(self, mbit: float) -> None:
        """How much the link carries, in each direction."""
        for port in ("port0", "port1"):
            rate = f"{mbit * 1e6:.0f}bit"
            self._in_switch(
                "tc", "qdisc", "replace", "dev", port, "root", "tbf", "rate", rate, "burst", "8kb", "latency", "400ms"
            )

    def unlimit(self) -> None:
        for port in ("port0", "port1"):
            self._in_switch("tc", "qdisc", "delete", "dev", port, "root")

    def listeners(self, host: int) -> set[str]:
        """Addresses other than loopback on which somebody listens there, without ports."""
        found = subprocess.run(
            self.command(host, "ss", "-H", "-l", "-t", "-n"), capture_output=True, text=True, check=True
        )
        addresses = {line.split()[3].rpartition(":")[0] for line in found.stdout.splitlines()}
        return {address for address in addresses if not address.startswith("127.")}

    def _in_switch(self, *command: str) -> None:
        _run("nsenter", "--net", f"--target={self._switch}", "--", *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Skips the test where there can be none. All of them is gone afterwards, with whatever runs there."""
    missing = [name for name in ("ip", "tc", "ss", "unshare", "nsenter") if shutil.which(name) is None]
    if os.getuid() != 0 or missing:
        pytest.skip(f"two hosts need network namespaces: root, iproute2 and util-linux ({missing or 'not root'})")
    started: list[subprocess.Popen[bytes]] = []
    try:
        switch = [
            "unshare",
            "--net",
            "--",
            "sh",
            "-c",
            f"ip link add name {_SWITCH} type bridge && ip link set {_SWITCH} up",
        ]
        started.append(_start([*switch[:-1], f"{switch[-1]} && echo ready && exec sleep infinity"]))
        if started[0].stdout.readline() != b"ready\n":
            pytest.skip("two hosts need network namespaces and bridges, which this kernel does not give")
        for _ in ADDRESSES:
            spaces = ["--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
            started.append(_start(["unshare", *spaces, "--", "sh", "-c", "echo ready && exec sleep infinity"]))
            assert started[-1].stdout.readline() == b"ready\n"
        yield TwoHosts([_child_of(process.pid) for process in started[1:]], started[0].pid)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            process.stdout.close()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
