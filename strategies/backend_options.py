"""Options of gloo and NCCL by flag. Both read them from the environment when a process group starts.

NCCL's are those of https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html that change how it communicates,
``TORCH_NCCL_*`` those of https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html.
"""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Mapping

from ..errors import UserError

FLAG = "--trainer.strategy.backend_options"

_ANY, _NUMBER, _SWITCH = "a text", "a whole number >= 0", "0 or 1"
_ALGORITHMS = "Tree, Ring, CollnetDirect, CollnetChain, NVLS, NVLSTree or PAT"

_KINDS: Mapping[str, Mapping[str, str]] = {
    "gloo": {"GLOO_SOCKET_IFNAME": "interfaces of this host"},
    "nccl": {
        "NCCL_ALGO": _ALGORITHMS,
        "NCCL_PROTO": "LL, LL128 or Simple",
        "NCCL_SOCKET_FAMILY": "AF_INET or AF_INET6",
        **dict.fromkeys(
            ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_P2P_LEVEL", "NCCL_NET_GDR_LEVEL", "NCCL_NET"), _ANY
        ),
        **dict.fromkeys(("NCCL_BUFFSIZE", "NCCL_NTHREADS", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS"), _NUMBER),
        **dict.fromkeys(("NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD", "NCCL_MIN_CTAS", "NCCL_MAX_CTAS"), _NUMBER),
        **dict.fromkeys(("NCCL_IB_TIMEOUT", "NCCL_IB_RETRY_CNT", "NCCL_IB_GID_INDEX", "NCCL_IB_TC"), _NUMBER),
        **dict.fromkeys(("NCCL_IB_QPS_PER_CONNECTION", "NCCL_CROSS_NIC", "TORCH_NCCL_ASYNC_ERROR_HANDLING"), _NUMBER),
        **dict.fromkeys(("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE"), _SWITCH),
        **dict.fromkeys(("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ENABLE_MONITORING"), _SWITCH),
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": _NUMBER,
    },
}


def check_backend_options(options: Mapping[str, object] | None, flag: str = FLAG) -> dict[str, str]:
    """Names and values as the environment holds them; ``flag``: where the user gave them, for messages.

    Raises:
        UserError: an unknown name, with the nearest ones, or a value that cannot be.
    """
    known = {name: kind for kinds in _KINDS.values() for name, kind in kinds.items()}
    checked = {}
    for name, value in (options or {}).items():
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name.upper(), known, cutoff=0.5) or known)
            raise UserError(f"{flag}: unknown name {name!r}; nearest: {nearest}")
        text = checked[name] = str(int(value) if isinstance(value, bool) else value)
        if not _can_be(known[name], text):
            raise UserError(f"{flag}: {name} must be {_told(known[name])}, got {text!r}")
    return checked


def apply_backend_options(options: Mapping[str, str], backend: str, group_exists: bool, flag: str = FLAG) -> None:
    """Put them into this process's environment, in place of what is there.

    Raises:
        UserError: an option is another backend's, or this process has its group already.
    """
    foreign = [name for name in options if name not in _KINDS[backend]]
    if foreign:
        raise UserError(f"{flag}: {foreign[0]} does nothing here: gradients travel by {backend}")
    if group_exists and any(os.environ.get(name) != value for name, value in options.items()):
        raise UserError(f"{flag}: this process has its process group already; give the same to the first fit")
    os.environ.update(options)


def _can_be(kind: str, value: str) -> bool:
    if kind == _NUMBER:
        return value.isdecimal()
    if kind == _KINDS["gloo"]["GLOO_SOCKET_IFNAME"]:
        return set(value.split(",")) <= set(_interfaces())
    # NCCL takes a list in which `^` excludes, with rules of its own: at most words are looked at.
    words = {word.strip().strip("^") for word in value.split(",")}
    return kind == _ANY or words <= set(kind.replace(" or ", ", ").split(", "))


def _told(kind: str) -> str:
    is_interface = kind == _KINDS["gloo"]["GLOO_SOCKET_IFNAME"]
    return f"{kind} ({', '.join(_interfaces())})" if is_interface else kind


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
