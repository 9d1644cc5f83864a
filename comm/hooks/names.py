"""Communication hooks by name or dotted path, with the state they need."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from .bridge import BadHook
from .int8 import Int8State, int8_hook
from .state import unwrapped
from .top_k import TopKState, top_k_hook

HOOKS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "fp16_wrapper": default_hooks.fp16_compress_wrapper,
    "bf16_wrapper": default_hooks.bf16_compress_wrapper,
    "powersgd": powerSGD_hook.powerSGD_hook,
    "int8": int8_hook,
    "top_k": top_k_hook,
}
"""Short names. ``bf16_wrapper(powersgd)`` applies a wrapper to a hook."""

_WRAPPERS = (default_hooks.fp16_compress_wrapper, default_hooks.bf16_compress_wrapper)

_STATES: dict[Any, type] = {
    powerSGD_hook.powerSGD_hook: powerSGD_hook.PowerSGDState,
    int8_hook: Int8State,
    top_k_hook: TopKState,
}

_BROKEN_ON_GLOO = {
    "batched_powerSGD_hook": "in torch 2.14 it fails on gloo; powersgd works",
    "quantization_pertensor_hook": "in torch 2.14 it fails on gloo; int8 works",
    "quantization_perchannel_hook": "in torch 2.14 it fails on gloo; int8 works",
}

_WRAPPED = re.compile(r"^([\w.]+)\((.+)\)$")


def make_hook(
    given: Any, state: Any, group: dist.ProcessGroup, named_parameters: Sequence[tuple[str, Tensor]]
) -> tuple[Any, Any]:
    """The hook and its state, ready for :class:`.HookAlgorithm`.

    Args:
        given: A callable, a short name, a dotted path, or ``wrapper(hook)`` of such names.
        state: The state itself; or the arguments of its class as a mapping, for the hooks whose class is known; or
            ``{"class_path": ..., "init_args": {...}}``. The arguments ``process_group`` and ``named_parameters`` are
            filled in. None: defaults.
        group: What the hook shall communicate over.
        named_parameters: Those whose gradients it will get.

    Raises:
        BadHook: there is no such hook, its state cannot be made, or it cannot work here.
    """
    hook: Any = _find(given) if isinstance(given, str) else given
    if hook in _WRAPPERS:
        raise BadHook(f"{given!r} wraps a hook: write {given}(hook), with one of {', '.join(_plain_names())}")
    if not _takes_state_and_bucket(hook):
        raise BadHook(f"communication hook {given!r} cannot be called with (state, bucket)")
    inner = unwrapped(hook)
    name = getattr(inner, "__name__", str(inner))
    if name in _BROKEN_ON_GLOO and "gloo" in dist.get_backend(group):
        raise BadHook(f"communication hook {name} cannot run here: {_BROKEN_ON_GLOO[name]}")
    return hook, _make_state(inner, name, state, {"process_group": group, "named_parameters": named_parameters})


def _find(text: str) -> Any:
    if match := _WRAPPED.match(text):
        return _apply(_find(match[1]), _find(match[2]), text)
    if text in HOOKS:
        return HOOKS[text]
    module, _, name = text.rpartition(".")
    if not module:
        raise BadHook(f"there is no communication hook {text!r}: give one of {', '.join(HOOKS)}, or a dotted path")
    return _import(module, name, text)


def _apply(wrapper: Any, hook: Any, text: str) -> Any:
    try:
        return wrapper(hook)
    except TypeError as error:
        raise BadHook(f"{text!r}: {getattr(wrapper, '__name__', wrapper)} does not wrap hooks ({error})") from error


def _plain_names() -> list[str]:
    return [name for name, hook in HOOKS.items() if hook not in _WRAPPERS]


def _takes_state_and_bucket(hook: Any) -> bool:
    try:
        inspect.signature(hook).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _import(module: str, name: str, text: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadHook(f"{text!r} cannot be imported: {error}") from error


def _make_state(hook: Any, name: str, state: Any, context: dict[str, Any]) -> Any:
    if state is not None and not isinstance(state, Mapping):
        return state
    options = dict(state or {})
    if "class_path" in options:
        class_path = str(options["class_path"])
        module, _, cls_name = class_path.rpartition(".")
        cls = _import(module, cls_name, class_path)
        options = dict(options.get("init_args") or {})
    else:
        cls = _STATES.get(hook)
    if cls is None:
        if options:
            raise BadHook(f"communication hook {name} takes no options, got {', '.join(options)}")
        return context["process_group"]
    accepted = inspect.signature(cls).parameters
    options |= {key: value for key, value in context.items() if key in accepted}
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise BadHook(f"state of communication hook {name}: {error}") from error
