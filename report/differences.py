"""What else changed between two folders of results, so that nobody takes it for an effect of the change under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .before_after import BeforeAfter
from .caveats import OWN_TO_A_RUN, is_varied
from .circumstances import flat_settings, value_text
from .fields import one_line
from .figures import shown_count
from .results import Result

_BASICS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("data", lambda result: result.data or "not recorded"),
    ("global batch size", lambda result: shown_count(result.global_batch_size)),
    ("epochs", lambda result: str(len(result.epochs))),
    ("warm-up steps", lambda result: shown_count(result.warmup_steps)),
)


def difference_lines(folders: BeforeAfter) -> list[str]:
    """One line for each thing that is not the same in both, over the methods that both have."""
    before = [result for method in folders.methods for result in method.before.results]
    after = [result for method in folders.methods for result in method.after.results]
    lines = [line for name, read in _BASICS for line in _changed(name, before, after, read)]
    return [*lines, *_environments(before, after), *_options(folders), *_settings(before, after)]


def _environments(before: Sequence[Result], after: Sequence[Result]) -> Iterator[str]:
    for key in dict.fromkeys(key for result in (*before, *after) for key in result.environment):
        if key not in OWN_TO_A_RUN:
            yield from _changed(one_line(key), before, after, lambda r, k=key: value_text(r.environment.get(k)))


def _options(folders: BeforeAfter) -> Iterator[str]:
    for method in folders.methods:
        name = f"options of {method.label}"
        yield from _changed(name, method.before.results, method.after.results, _options_of)


def _options_of(result: Result) -> str:
    return value_text(result.environment.get("strategy_options") or {})


def _settings(before: Sequence[Result], after: Sequence[Result]) -> Iterator[str]:
    """Of files that hold their configuration; a file without one does not differ, it just does not tell."""
    old, new = ([result for result in side if result.config] for side in (before, after))
    settings = {id(result): dict(flat_settings(result.config)) for result in (*old, *new)}
    if old and new:
        for key in sorted({key for setting in settings.values() for key in setting}):
            if not is_varied(key):
                yield from _changed(f"setting {key}", old, new, lambda r, k=key: settings[id(r)].get(k, "absent"))


def _changed(
    name: str, before: Sequence[Result], after: Sequence[Result], read: Callable[[Result], str]
) -> Iterator[str]:
    old, new = (list(dict.fromkeys(map(read, side))) for side in (before, after))
    if set(old) != set(new):
        yield f"{name}: {' and '.join(old)} before, {' and '.join(new)} after"
