"""The report's section on where the figures come from: machine, versions, data, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .comparison import Comparison
from .fields import one_line
from .figures import shown_count
from .results import Result


def environment_lines(comparison: Comparison) -> list[str]:
    """Each value once if it is the same for all, else with the files that have it."""
    results = comparison.results
    lines = [f"Data: {shared(results, lambda result: result.data or 'not recorded')}."]
    keys = dict.fromkeys(key for result in results for key in result.environment)
    silent = [result.filename for result in results if not result.environment]
    if silent:
        lines.append(f"No environment recorded in {', '.join(silent)}.")
    for key in keys:
        if key != "strategy_options":
            lines.append(
                f"{one_line(key)}: {shared(results, lambda result, key=key: value_text(result.environment.get(key)))}"
            )
    options = {
        f"Options of {result.method}: {value_text(options)}"
        for result in results
        if (options := result.environment.get("strategy_options"))
    }
    lines.extend(sorted(options))
    warm_up = shared(results, lambda result: shown_count(result.warmup_steps))
    lines.append(f"Batch size per process: {shared(results, lambda result: shown_count(result.batch_size))}")
    lines.append(f"Steps left out of time figures as warm-up: {warm_up}")
    lines.append(f"Run from {_earliest(results)} to {_latest(results)}.")
    return lines


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with its path, such as ``("trainer.precision", "32-true")``."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield one_line(f"{prefix}{key}"), value_text(value)


def value_text(value: Any) -> str:
    """A value of a configuration or an environment on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{one_line(key)}={value_text(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else one_line(str(value))


def shared(results: Sequence[Result], read: Callable[[Result], str]) -> str:
    """The one value, or every value with the files that have it."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(read(result), []).append(result.filename)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def _earliest(results: Sequence[Result]) -> str:
    return min((result.start_time for result in results if result.start_time), default="an unknown time")


def _latest(results: Sequence[Result]) -> str:
    return max((result.end_time for result in results if result.end_time), default="an unknown time")
