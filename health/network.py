"""Where processes of a run would meet, and by which interface."""

from __future__ import annotations

import os
import socket

from .check import Check
from .planned_run import Launched, PlannedRun

_LOOPBACK = "127.0.0.1"


def check_loopback() -> Check:
    """A connection is made, to a port that the kernel chose."""
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((_LOOPBACK, port), timeout=5).close()
    except OSError as error:
        remedy = "ip link set lo up: the processes of a run meet there"
        return Check("loopback", "FAIL", f"{_LOOPBACK} cannot be used: {error}", remedy)
    return Check("loopback", "ok", f"free ports on {_LOOPBACK} can be reached")


def check_meeting_place(launched: Launched | None) -> Check:
    """``MASTER_ADDR`` and ``MASTER_PORT``, where they are set."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    values = {"address": address, "port": port}
    if launched:
        return Check("MASTER_PORT", "ok", f"{address}:{port}, which the launcher holds", values=values)
    if address is not None and (problem := _unresolved(address)):
        found = f"MASTER_ADDR {address!r} leads nowhere: {problem}"
        return Check("MASTER_PORT", "FAIL", found, "unset MASTER_ADDR, for a run on one host", values)
    if port is None:
        return Check("MASTER_PORT", "ok", "not set: each run takes a free port", values=values)
    if not port.isdigit() or not 0 < int(port) < 2**16:
        return Check("MASTER_PORT", "FAIL", f"MASTER_PORT {port!r} is no port", "unset MASTER_PORT", values)
    if problem := _obstacle_to_listening(int(port)):
        remedy = f"unset MASTER_PORT, or export MASTER_PORT={_free_port()} (free now)"
        return Check("MASTER_PORT", "FAIL", f"port {port} on {_LOOPBACK}: {problem}", remedy, values)
    return Check("MASTER_PORT", "ok", f"port {port} on {_LOOPBACK} is free", values=values)


def _obstacle_to_listening(port: int) -> str | None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of a run
        try:
            listener.bind((_LOOPBACK, port))
        except OSError as error:
            return error.strerror
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return listener.getsockname()[1]


def check_interfaces(run: PlannedRun) -> Check:
    """What ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` name must be there."""
    there = [name for _, name in socket.if_nameindex()]
    values = {"interfaces": there, **{name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", _NCCL)}}
    for variable, unknown in (("GLOO_SOCKET_IFNAME", _unknown_to_gloo(there)), (_NCCL, _unknown_to_nccl(there))):
        if unknown:
            used = variable.startswith(run.backend.upper())
            found = f"{variable} names {', '.join(unknown)}; there are {', '.join(there)}"
            remedy = f"export {variable}=lo (runs on one host), or unset {variable}"
            return Check("interfaces", "FAIL" if used else "warn", found, remedy, values)
    chosen = os.environ.get(f"{run.backend.upper()}_SOCKET_IFNAME")
    found = f"{', '.join(there)}; {run.backend} takes {chosen or 'that of the host name'}"
    return Check("interfaces", "ok", found, values=values)


_NCCL = "NCCL_SOCKET_IFNAME"


def _unknown_to_gloo(there: list[str]) -> list[str]:
    """gloo takes whole names, with commas between them."""
    return [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name and name not in there]


def _unknown_to_nccl(there: list[str]) -> list[str]:
    """NCCL takes beginnings of names, whole ones after "=", and after "^" those not to use. One that fits will do."""
    text = os.environ.get(_NCCL, "")
    if not text or text.startswith("^"):
        return []
    exact, names = text.startswith("="), text.removeprefix("=").split(",")
    found = any(name == given if exact else name.startswith(given) for given in names for name in there)
    return [] if found else names


def check_host_name(run: PlannedRun) -> Check:
    """gloo looks for its interface by the host's name."""
    name = socket.gethostname()
    problem = _unresolved(name)
    values = {"host_name": name, "problem": problem}
    if not problem:
        return Check("host name", "ok", f"{name} leads to {socket.gethostbyname(name)}", values=values)
    if run.backend == "nccl" or os.environ.get("GLOO_SOCKET_IFNAME"):
        return Check("host name", "ok", f"{name} leads nowhere, and {run.backend} does not need it", values=values)
    remedy = f"export GLOO_SOCKET_IFNAME=lo (one host), or add {name} to /etc/hosts"
    return Check("host name", "warn", f"{name} leads nowhere ({problem})", remedy, values)


def _unresolved(name: str) -> str | None:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return error.strerror or str(error)
    return None
