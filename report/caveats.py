"""What makes the figures of a comparison less comparable than they look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .circumstances import flat_settings, shared, value_text
from .comparison import Comparison, plural
from .fields import one_line
from .figures import ratio, shown_count
from .noise import LOAD_KEY, noise_lines
from .results import Result

# What a comparison changes on purpose from one method to the next.
_VARIED_SETTINGS = (
    "config",
    "ckpt_path",
    "results",
    "run_dir",
    "variant",
    "progress_every_n_steps",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
)

OWN_TO_A_RUN = ("strategy_options", LOAD_KEY)
"""Of the environment: what may well differ from run to run."""

_LOADER_BOUND = 0.2
"""Share of a step that waits for data from which a run is called so."""

# What a difference means for the figures, where that is not plain.
_CONSEQUENCES = {
    "seed": " Their data order and losses need not be the same.",
    **dict.fromkeys(
        ("platform", "cpu_model", "cpu_count", "accelerator", "omp_num_threads"), " Their speeds do not compare."
    ),
    **dict.fromkeys(
        ("python", "torch", "lightning", "gradsync", "commit", "backend"), " It may be that, and not the method."
    ),
}


def warning_lines(comparison: Comparison) -> list[str]:
    """Everything that a careful reader should know before believing the tables."""
    checks: tuple[Callable[[Comparison], Iterator[str]], ...] = (
        _demo_data,
        _incomplete,
        _unread_images,
        _skipped_steps,
        _lost_workers,
        _waiting_for_data,
        noise_lines,
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


def _unread_images(comparison: Comparison) -> Iterator[str]:
    for result in comparison.results:
        if result.num_bad_samples > 0:
            count = plural(round(result.num_bad_samples), "image")
            first = result.first_bad_sample
            yield f"{result.filename}: its run left out {count} that could not be read, first {first}."


def _skipped_steps(comparison: Comparison) -> Iterator[str]:
    for result in comparison.results:
        if result.num_skipped_steps > 0:
            count = plural(result.num_skipped_steps, "step")
            yield f"{result.filename}: its run left out {count} because gradients were NaN or infinite."


def _lost_workers(comparison: Comparison) -> Iterator[str]:
    for result in comparison.results:
        if result.lost_workers:
            yield f"{result.filename}: its run went on without {' and '.join(result.lost_workers)}."


def _waiting_for_data(comparison: Comparison) -> Iterator[str]:
    """A run that its loader holds back says little about its strategy."""
    for group in comparison.groups:
        share = ratio(group.comm("data_ms").median, group.comm("step_ms").median)
        if share >= _LOADER_BOUND:
            yield (
                f"{comparison.label(group)} is loader-bound: {share:.0%} of a step is waiting for data. Its speed says "
                "more about the loader than about the strategy: raise --data.num_workers."
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
                yield f"The runs differ in {name}: {shared(results, read)}."


def _unequal_settings(comparison: Comparison) -> Iterator[str]:
    for members in comparison.by_size():
        results = [result for group in members for result in group.results if result.config]
        settings = [dict(flat_settings(result.config)) for result in results]
        told = {"seed_everything"} if all("seed" in result.environment for result in results) else set()
        for key in sorted({key for setting in settings for key in setting} - told):
            values = {id(result): setting.get(key, "absent") for result, setting in zip(results, settings, strict=True)}
            if not is_varied(key) and len(set(values.values())) > 1:
                yield f"The runs differ in the setting {key}: {shared(results, lambda r, v=values: v[id(r)])}."


def _unequal_environments(comparison: Comparison) -> Iterator[str]:
    results = [result for result in comparison.results if result.environment]
    for key in dict.fromkeys(key for result in results for key in result.environment):
        values = {value_text(result.environment.get(key)) for result in results}
        if key not in OWN_TO_A_RUN and len(values) > 1:
            where = shared(results, lambda r, k=key: value_text(r.environment.get(k)))
            yield f"The runs differ in {one_line(key)}: {where}.{_CONSEQUENCES.get(key, '')}"
    for group in comparison.groups:
        options = {value_text(result.environment.get("strategy_options")) for result in group.results}
        if len(options) > 1:
            yield f"What counts as repeats of {comparison.label(group)} has different options: {'; '.join(options)}."


def is_varied(key: str) -> bool:
    """Whether the setting differs from method to method on purpose."""
    return any(key == varied or key.startswith(f"{varied}.") for varied in _VARIED_SETTINGS)
