"""Which network interface leads to the other hosts of a run: gloo's own choice follows the host's name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def use_interface_towards(address: str) -> None:
    """Let gloo use, and listen on, the interface by which this host reaches ``address``; a user's choice stands.

    On most systems a host's own name leads to loopback, where no other host gets through. On the host that has
    ``address`` it is the interface with it. Nothing changes where none is found.
    """
    if _VARIABLE in os.environ:
        return
    with contextlib.suppress(OSError):
        name = _name_of(_source_towards(address))
        if name is not None:
            os.environ[_VARIABLE] = name


def _source_towards(address: str) -> str:
    """Of this host's addresses the one that packets to ``address`` carry; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]


def _name_of(source: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24]) == source:
                    return name
    return None
