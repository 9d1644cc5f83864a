"""The five pictures: they are made from any input, and nothing in them overlaps or is cut off."""

import math
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from result_files import make_result, original_only, write_comparison, write_result

from gradsync.errors import UserError
from gradsync.report.comparison import Comparison
from gradsync.report.plot_bars import communication_figure, throughput_figure, time_figure
from gradsync.report.plot_lines import accuracy_figure, loss_figure
from gradsync.report.plots import write_plots
from gradsync.report.results import load_results

NAMES = {
    "throughput_comparison.png",
    "training_time_comparison.png",
    "loss_curves.png",
    "accuracy_curves.png",
    "communication_overhead.png",
}
FIGURES = (throughput_figure, time_figure, loss_figure, accuracy_figure, communication_figure)
ODD_NAMES = ("$x_{", "_hidden", "100 % {}", "日本語", "a long name " * 8, "Without" * 12, "[bold]", "\\frac", "a\nb")


def load(folder: Path) -> Comparison:
    return Comparison.of(folder, load_results(folder))


def nothing_but_nan() -> dict:
    result = make_result("manual_allreduce", summary={}, comm={}, all_losses=[math.nan] * 9)
    for epoch in result["epochs"]:
        epoch.update({key: math.nan for key in epoch if key != "epoch"})
    return result


@pytest.fixture(
    params=["plain", "repeats", "sweep", "original", "one", "nan", "half nan", "no losses", "odd", "variants"]
)
def comparison(request: pytest.FixtureRequest, tmp_path: Path) -> Comparison:
    """Realistic and extreme folders."""
    kind = request.param
    if kind == "plain":
        write_comparison(tmp_path)
    elif kind == "repeats":
        write_comparison(tmp_path, repeats=3)
    elif kind == "sweep":
        write_comparison(tmp_path, counts=(1, 2, 4, 8), epochs=1, steps_per_epoch=5)
    elif kind == "original":
        for strategy in ("ddp", "manual_allreduce", "parameter_server"):
            write_result(tmp_path, original_only(make_result(strategy)) | {"strategy": strategy})
    elif kind == "one":
        write_result(tmp_path, make_result("parameter_server", training_processes=1, epochs=1, steps_per_epoch=1))
    elif kind == "nan":
        write_result(tmp_path, nothing_but_nan())
    elif kind == "half nan":
        write_result(tmp_path, nothing_but_nan())
        write_result(tmp_path, make_result("ddp"))
    elif kind == "variants":
        write_comparison(tmp_path)
        for variant in ("mode=async", "servers=2+transport=tcp", "mode=bounded+staleness=4+wire_dtype=bfloat16"):
            write_result(tmp_path, make_result("parameter_server", variant=variant))
    elif kind == "no losses":
        write_comparison(tmp_path, all_losses=[])
    else:
        for index, name in enumerate(ODD_NAMES):
            result = make_result(f"odd{index}", loss_seed=index, throughput=10.0**index, method=name)
            write_result(tmp_path, result)
    return load(tmp_path)


def test_all_five_are_written_and_are_pictures(comparison: Comparison) -> None:
    paths = write_plots(comparison)
    assert {path.name for path in paths} == NAMES
    for path in paths:
        assert path.parent == comparison.folder / "plots"
        assert imread(path).std() > 0.01


@pytest.mark.filterwarnings("ignore:Glyph .* missing from")
@pytest.mark.parametrize("draw", FIGURES)
def test_axes_are_named_and_labels_neither_overlap_nor_leave_the_picture(comparison: Comparison, draw) -> None:
    figure: Figure = draw(comparison)
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_xlabel()
        if draw in (loss_figure, accuracy_figure):
            assert axes.get_ylabel()
        else:
            assert axes.get_xlim()[0] == 0
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent() for label in labels if label.get_visible()]
            assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[index + 1 :])
        values = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for index, a in enumerate(values) for b in values[index + 1 :])
        assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in values)
        ticks = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        assert all(box.x0 >= 0 for box in ticks)


def test_bars_are_as_long_as_the_figures_and_carry_them(tmp_path: Path) -> None:
    for strategy, throughput in (("ddp", 400.0), ("manual_allreduce", 500.0)):
        write_result(tmp_path, make_result(strategy, throughput=throughput))
    (axes,) = throughput_figure(load(tmp_path)).axes
    assert [patch.get_width() for patch in axes.patches] == [400.0, 500.0]
    assert [text.get_text() for text in axes.texts] == ["400.0  (1.00x)", "500.0  (1.25x)"]


def test_step_parts_add_up_to_the_step(tmp_path: Path) -> None:
    comparison = load(write_comparison(tmp_path))
    (axes,) = communication_figure(comparison).axes
    for row, group in enumerate(comparison.groups):
        bars = [bar for bar in axes.patches if bar.get_y() < row < bar.get_y() + bar.get_height()]
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert max(ends) == pytest.approx(group.comm("step_ms").median)


def test_equal_curves_stay_visible(tmp_path: Path) -> None:
    """Three methods with the same losses: each lies on top of a wider one."""
    (axes,) = loss_figure(load(write_comparison(tmp_path))).axes
    thick = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    widths = [line.get_linewidth() for line in sorted(thick, key=lambda line: line.get_zorder())]
    assert len(widths) == 3
    assert widths == sorted(set(widths), reverse=True)


def test_repeats_are_thin_lines(tmp_path: Path) -> None:
    (axes,) = accuracy_figure(load(write_comparison(tmp_path, repeats=4))).axes
    assert sum(line.get_linewidth() < 1 for line in axes.lines) == 12


def test_a_missing_curve_is_said_in_the_picture(tmp_path: Path) -> None:
    write_result(tmp_path, nothing_but_nan())
    write_result(tmp_path, make_result("ddp"))
    for draw in (loss_figure, accuracy_figure):
        (axes,) = draw(load(tmp_path)).axes
        assert any("Manual All-Reduce" in text.get_text() for text in axes.texts)


def test_the_same_files_give_the_same_pictures(tmp_path: Path) -> None:
    comparison = load(write_comparison(tmp_path))
    first = [path.read_bytes() for path in write_plots(comparison)]
    assert first == [path.read_bytes() for path in write_plots(comparison)]


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load(write_comparison(tmp_path))
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        write_plots(comparison)
