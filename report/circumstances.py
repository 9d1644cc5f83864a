"""The report's sections on where the figures come from, and on what makes them less comparable than they look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .comparison import Comparison, plural
from .fields import one_line
from .figures import shown_count
from .results import Result
from .throughput import span

_NOISY_FROM = 0.10

# What a comparison changes on purpose from one method to the next.
_VARIED_SETTINGS = (
    "config",
    "ckpt_path",
    "results",
    "run_dir",
    "progress_every_n_steps",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
)


def environment_lines(comparison: Comparison) -> list[str]:
    """Each value once if it is the same for all, else with the files that have it."""
    results = comparison.results
    lines = [f"Data: {_shared(results, lambda result: result.data or 'not recorded')}."]
    keys = dict.fromkeys(key for result in results for key in result.environment)
    silent = [result.filename for result in results if not result.environment]
    if silent:
        lines.append(f"No environment recorded in {', '.join(silent)}.")
    for key in keys:
        if key != "strategy_options":
            lines.append(f"{key}: {_shared(results, lambda result, key=key: _value(result.environment.get(key)))}")
    options = {
        f"Options of {result.method}: {_value(options)}"
        for result in results
        if (options := result.environment.get("strategy_options"))
    }
    lines.extend(sorted(options))
    warm_up = _shared(results, lambda result: shown_count(result.warmup_steps))
    lines.append(f"Batch size per process: {_shared(results, lambda result: shown_count(result.batch_size))}")
    lines.append(f"Steps left out of time figures as warm-up: {warm_up}")
    lines.append(f"Run from {_earliest(results)} to {_latest(results)}.")
    return lines


def warning_lines(comparison: Comparison) -> list[str]:
    """Everything that a careful reader should know before believing the tables."""
    checks: tuple[Callable[[Comparison], Iterator[str]], ...] = (
        _demo_data,
        _incomplete,
        _noisy,
        _unequal_processes,
        _unequal_basics,
        _unequal_settings,
        _unequal_environments,
    )
    return [*comparison.problems, *(line for check in checks for line in check(comparison))]


def _demo_data(comparison: Comparison) -> Iterator[str]:
    demo = [result for result in comparison.results if result.demo_data]
    if demo:
        which = "All" if len(demo) == len(comparison.results) else f"{len(demo)} of {len(comparison.results)}"
        what = f" ({demo[0].data})" if demo[0].data else ""
        yield f"{which} runs used demo data{what}: the accuracies tell nothing about ImageNet."


def _incomplete(comparison: Comparison) -> Iterator[str]:
    most = max(len(result.epochs) for result in comparison.results)
    for result in comparison.results:
        done, planned = len(result.epochs), _planned_epochs(result)
        if result.complete is False:
            epochs = f"{done} of {planned} epochs" if planned else plural(done, "epoch")
            yield f"{result.filename} is incomplete ({epochs}): its run was cut off or is still going on."
        elif done < most:
            yield f"{result.filename} has {plural(done, 'epoch')}, others have up to {most}."


def _planned_epochs(result: Result) -> int | None:
    trainer = result.config.get("trainer")
    planned = trainer.get("max_epochs") if isinstance(trainer, Mapping) else None
    return planned if isinstance(planned, int) and planned > 0 else None


def _noisy(comparison: Comparison) -> Iterator[str]:
    for group in comparison.groups:
        if group.throughput.relative > _NOISY_FROM:
            yield (
                f"{comparison.label(group)} is noisy: {span(group.throughput)} img/s over {group.repeats} repeats, "
                f"{group.throughput.relative * 100:.0f} % of the median. A quieter machine or more repeats would help."
            )


def _unequal_processes(comparison: Comparison) -> Iterator[str]:
    sizes: dict[tuple[int, ...], list[str]] = {}
    for method in dict.fromkeys(group.method for group in comparison.groups):
        counts = tuple(group.training_processes for group in comparison.sizes_of(method))
        sizes.setdefault(counts, []).append(method)
    if len(sizes) > 1:
        parts = (f"{', '.join(methods)}: {', '.join(map(str, counts))}" for counts, methods in sizes.items())
        yield f"The methods ran with different numbers of training processes ({'; '.join(parts)})."


def _unequal_basics(comparison: Comparison) -> Iterator[str]:
    """What must be equal among methods that are compared with each other."""
    figures: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("global batch sizes", lambda result: shown_count(result.global_batch_size)),
        ("data", lambda result: result.data or "not recorded"),
        ("numbers of warm-up steps", lambda result: shown_count(result.warmup_steps)),
    )
    for members in comparison.by_size():
        results = [result for group in members for result in group.results]
        for name, read in figures:
            if len({read(result) for result in results}) > 1:
                yield f"The runs differ in {name}: {_shared(results, read)}."


def _unequal_settings(comparison: Comparison) -> Iterator[str]:
    for members in comparison.by_size():
        results = [result for group in members for result in group.results if result.config]
        settings = [dict(_flat(result.config)) for result in results]
        for key in sorted({key for setting in settings for key in setting}):
            values = {id(result): setting.get(key, "absent") for result, setting in zip(results, settings, strict=True)}
            if not _is_varied(key) and len(set(values.values())) > 1:
                yield f"The runs differ in the setting {key}: {_shared(results, lambda r, v=values: v[id(r)])}."


def _unequal_environments(comparison: Comparison) -> Iterator[str]:
    results = [result for result in comparison.results if result.environment]
    for key in dict.fromkeys(key for result in results for key in result.environment):
        values = {_value(result.environment.get(key)) for result in results}
        if key != "strategy_options" and len(values) > 1:
            yield f"The runs differ in {key}: {_shared(results, lambda r, k=key: _value(r.environment.get(k)))}."
    for group in comparison.groups:
        options = {_value(result.environment.get("strategy_options")) for result in group.results}
        if len(options) > 1:
            yield f"What counts as repeats of {comparison.label(group)} has different options: {'; '.join(options)}."


def _is_varied(key: str) -> bool:
    return any(key == varied or key.startswith(f"{varied}.") for varied in _VARIED_SETTINGS)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_value(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else one_line(str(value))


def _shared(results: list[Result], read: Callable[[Result], str]) -> str:
    """The one value, or every value with the files that have it."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(read(result), []).append(result.filename)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def _earliest(results: list[Result]) -> str:
    return min((result.start_time for result in results if result.start_time), default="an unknown time")


def _latest(results: list[Result]) -> str:
    return max((result.end_time for result in results if result.end_time), default="an unknown time")
