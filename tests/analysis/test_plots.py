"""The pictures hold the numbers of the record, and say whose they are."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch.testing import assert_close

from loramix import RoutingError, UnsupportedOperationError
from loramix.analysis import RoutingRecord, expert_colours, plots
from loramix.analysis.colours import PALETTE
from loramix.analysis.metrics import confidence_of, entropy_of
from loramix.analysis.show.canvas import MOST_GAPS, NAMED, distinct, drawable, paled, short_layers
from support.byte_tokenizer import byte_tokenizer
from support.records import random_record, record_of

ALL: dict[str, Any] = {
    "tokens": plots.tokens_by_experts,
    "layers": plots.layers_by_experts,
    "load": plots.load_bars,
    "entropy": plots.entropy_along,
    "comparison": lambda record: plots.comparison(record, record),
}


def heatmaps(figure: Figure) -> list[torch.Tensor]:
    """The arrays of the images of numbers, as opposed to those of colours."""
    found = [image.get_array() for axes in figure.axes for image in axes.get_images()]
    return [torch.tensor(np.asarray(array)).float() for array in found if array is not None and array.ndim == 2]


def strips(figure: Figure) -> list[list[str]]:
    """The colours of the images of colours."""
    found = [image.get_array() for axes in figure.axes for image in axes.get_images()]
    return [[to_hex(pixel) for pixel in array[0]] for array in found if array is not None and array.ndim == 3]


def labels(figure: Figure, which: str) -> list[str]:
    """The labels along the axes of each part."""
    axes = (getattr(one, f"get_{which}ticklabels")() for one in figure.axes)
    return [label.get_text() for label in itertools.chain(*axes)]


def overlapping(figure: Figure, which: str) -> list[str]:
    """Neighbouring labels of an axis that lie on each other."""
    figure.draw_without_rendering()
    found: list[str] = []
    for axes in figure.axes:
        boxes = [(label, label.get_window_extent()) for label in getattr(axes, f"get_{which}ticklabels")()]
        pairs = itertools.pairwise(boxes)
        found += [one.get_text() for (one, a), (_, b) in pairs if a.overlaps(b) and min(a.width, b.width) > 0]
    return found


def test_tokens_by_experts_holds_the_weights_in_lines() -> None:
    record = random_record(90, experts=3)
    figure = plots.tokens_by_experts(record)
    found = torch.cat(heatmaps(figure), 1)
    assert_close(found, record.weights.T)
    paint = expert_colours(record.experts)
    rows = zip(record.leading.tolist(), confidence_of(record.weights).tolist(), strict=True)
    leading = [to_hex(paled(paint[record.experts[i]], sure)) for i, sure in rows]
    assert list(itertools.chain(*strips(figure))) == leading
    assert [text for text in labels(figure, "x") if text.startswith("#")] == [f"#{i}" for i in range(90)]
    one = plots.tokens_by_experts(record, layer=1)
    assert_close(torch.cat(heatmaps(one), 1), record.scalings[:, 1].T)


def gapped(count: int = 40) -> RoutingRecord:
    """A text of which the tokens in the middle are missing."""
    whole = random_record(25 * count, experts=3)
    return whole.select(tokens=(whole.positions < count // 2) | (whole.positions >= 24 * count + count // 2))


def test_labels_are_the_positions_of_what_was_recorded() -> None:
    record = random_record(10_000).select(tokens=slice(0, None, 10))
    for figure in (plots.tokens_by_experts(record), plots.entropy_along(record), plots.comparison(record, record)):
        shown = {int(text) for text in labels(figure, "x") if text.isdigit()}
        assert shown <= set(record.positions.tolist())
        assert max(shown) > 9900


def test_a_gap_in_a_text_has_a_mark_at_its_place() -> None:
    record = gapped()
    for figure in (plots.tokens_by_experts(record), plots.entropy_along(record)):
        marks = [line for axes in figure.axes for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert [np.asarray(line.get_xdata()).tolist() for line in marks] == [[19.5, 19.5]] * 2  # in the strip too
    lines = {line.get_label(): line for line in plots.entropy_along(record).axes[1].get_lines()}
    entropy = entropy_of(record.scalings).mean(1).tolist()
    assert np.asarray(lines["each token"].get_xdata()).tolist() == [*range(20), 19.5, *range(20, 40)]
    assert np.asarray(lines["each token"].get_ydata()) == pytest.approx(
        [*entropy[:20], math.nan, *entropy[20:]], nan_ok=True
    )
    smooth = np.asarray(lines["mean of 5 tokens"].get_ydata())
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [16, 17, 18, 19]
    assert smooth[15] == pytest.approx(sum(entropy[15:20]) / 5)
    assert smooth[20] == pytest.approx(sum(entropy[20:25]) / 5)
    sampled = random_record(400).select(tokens=slice(0, None, 7))
    assert len(sampled) > MOST_GAPS
    assert not [
        1 for axes in plots.tokens_by_experts(sampled).axes for one in axes.get_lines() if one.get_linestyle() == ":"
    ]


def test_a_gap_within_a_run_has_its_mark_there() -> None:
    record = random_record(6000).select(tokens=[*range(4500), *range(4600, 4601), *range(5000, 5010)])
    figure = plots.tokens_by_experts(record)
    (found,) = heatmaps(figure)
    assert found.shape[1] == 376  # runs of 12; the last one of 11 tokens, in which both gaps are
    marks = [np.asarray(line.get_xdata())[0] for line in figure.axes[1].get_lines() if line.get_linestyle() == ":"]
    assert marks == pytest.approx([374.5, 374.5 + 1 / 11])
    assert max(marks) < figure.axes[1].get_xlim()[1]


def test_a_fork_without_tokens_of_its_own_is_compared_too() -> None:
    record = record_of(torch.softmax(torch.randn(7, 2, 3), -1), texts=[4, 3])
    record.header.forks[1] = (0, 2)
    whole = record.select(sequences=0)
    figure = plots.comparison(whole, whole, sequence=1)
    assert_close(heatmaps(figure)[0], whole.weights[:2].T, check_dtype=False)
    with pytest.raises(RoutingError, match="named by its number"):
        plots.comparison(whole, whole, sequence=2)
    for names in (["a"], "ab", ["a", "b", "c"]):
        with pytest.raises(RoutingError, match="two names"):
            plots.comparison(record, record, names)


def test_a_legend_of_long_names_is_inside_the_picture() -> None:
    record = random_record(30, experts=16)
    record.header.experts = record.header.palette = [f"WWWWWWWWWW {i} MMMMMMMMMM" for i in range(16)]
    figure = plots.entropy_along(record)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0


def test_tokens_that_no_expert_leads_are_white() -> None:
    record = record_of(torch.eye(3)[[0, 1, 0]][:, None].expand(3, 2, 3)).select(experts=["e1", "e2"])
    for kind in ("tokens", "entropy", "comparison"):
        assert strips(ALL[kind](record))[0] == ["#ffffff", PALETTE[1], "#ffffff"]


def test_negative_scalings_are_told_from_none_and_lead_as_everywhere() -> None:
    logits = torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(0)) - 2
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(2).indices, value=True)
    record = record_of(logits * kept)
    figure = plots.tokens_by_experts(record)
    paint = expert_colours(record.experts)
    rows = zip(record.leading.tolist(), confidence_of(record.weights).tolist(), strict=True)
    assert strips(figure)[0] == [to_hex(paled(paint[record.experts[i]], sure)) for i, sure in rows]
    for drawn in (figure, plots.layers_by_experts(record)):
        image = next(one for axes in drawn.axes for one in axes.get_images() if np.ndim(one.get_array()) == 2)
        low, high = image.get_clim()
        assert low == -high < 0
        assert image.get_cmap().name == "RdBu"


def test_fifty_tokens_of_sixty_four_experts_keep_their_text() -> None:
    record = random_record(50, experts=64)
    figure = plots.tokens_by_experts(record)
    assert [text for text in labels(figure, "x") if text.startswith("#")] == [f"#{i}" for i in range(50)]
    assert figure.get_size_inches()[1] <= 21


def test_names_that_look_alike_have_their_numbers() -> None:
    names = ["my-company-domain-math-v1-final-lora", "my-company-domain-code-v1-final-lora", "prose", "数学", "代码"]
    shown = distinct(names)
    assert len(set(shown)) == 5
    assert shown[2:] == ["prose", "3 □□", "4 □□"]


def test_every_kind_of_layer_has_a_name() -> None:
    for kinds, count in ((2, 224), (7, 210), (1, 100)):
        record = random_record(3, layers=count)
        record.header.layers = [f"model.layers.{i // kinds}.{'qkvogud'[i % kinds]}_proj" for i in range(count)]
        axes = plots.layers_by_experts(record).axes[0]
        shown = {label.get_text().rpartition(".")[2] for label in axes.get_yticklabels()}
        assert len(shown) == kinds


def test_one_token_is_drawn() -> None:
    record = random_record(1)
    line = next(line for line in plots.entropy_along(record).axes[1].get_lines() if line.get_label() == "each token")
    assert line.get_marker() == "o"
    assert plots.tokens_by_experts(record).get_size_inches()[0] < 8


def test_a_long_text_is_shown_in_runs() -> None:
    record = random_record(1000, experts=4)
    figure = plots.tokens_by_experts(record)
    (found,) = heatmaps(figure)
    assert found.shape == (4, 334)
    assert_close(found[:, :333], record.weights[:999].reshape(333, 3, 4).mean(1).T)
    assert_close(found[:, 333], record.weights[999])
    assert "runs of 3 tokens" in str(figure.get_suptitle())


def test_layers_by_experts_holds_the_means_and_single_tokens() -> None:
    record = random_record(30, layers=6, texts=[10, 20], parts=3)
    (found,) = heatmaps(plots.layers_by_experts(record))
    assert_close(found, record.scalings.mean(0))
    (found,) = heatmaps(plots.layers_by_experts(record, position=4, sequence=1))
    assert_close(found, record.scalings[14])
    with pytest.raises(RoutingError, match=r"one of these: 0, 1, 2, .* \(10\)"):
        plots.layers_by_experts(record, position=10)
    shared = random_record(30, layers=1, shared=True)
    figure = plots.layers_by_experts(shared)
    assert heatmaps(figure)[0].shape == (1, 3)
    assert "all layers" in labels(figure, "y")
    assert "one routing for all 4 layers" in figure.axes[0].get_xlabel()


def test_an_even_routing_is_pale_everywhere() -> None:
    record = record_of(torch.full((60, 8, 4), 0.25))
    for draw in (plots.layers_by_experts, plots.tokens_by_experts):
        image = next(one for axes in draw(record).axes for one in axes.get_images() if np.ndim(one.get_array()) == 2)
        assert image.get_clim() == (0, 0.5)


def test_load_bars_are_the_load_in_the_experts_colours() -> None:
    record = random_record(30, experts=5)
    figure = plots.load_bars(record)
    bars: list[Any] = list(figure.axes[0].patches)
    assert [bar.get_height() for bar in bars] == pytest.approx(record.metrics().load)
    assert [to_hex(bar.get_facecolor()) for bar in bars] == list(PALETTE[:5])
    some = plots.load_bars(record.select(experts=["e3", "e1"]))
    assert [to_hex(bar.get_facecolor()) for bar in some.axes[0].patches] == [PALETTE[3], PALETTE[1]]


def test_entropy_along_the_text_is_the_entropy() -> None:
    record = random_record(50)
    lines = {line.get_label(): line for line in plots.entropy_along(record).axes[1].get_lines()}
    entropy = entropy_of(record.scalings).mean(1)
    assert_close(torch.tensor(np.asarray(lines["each token"].get_ydata())).float(), entropy)
    smooth = torch.tensor(np.asarray(lines["mean of 6 tokens"].get_ydata()))
    assert_close(smooth[0], entropy[:6].mean())
    assert len(smooth) == 45


def test_a_comparison_holds_both_and_where_they_differ() -> None:
    one, other = random_record(30, seed=1), random_record(30, seed=2)
    figure = plots.comparison(one, other, ("before", "after"))
    found = heatmaps(figure)
    assert_close(found[0], one.weights.T)
    assert_close(found[1], other.weights.T)
    from loramix.analysis import drift

    bars = [bar.get_height() for axes in figure.axes for bar in axes.patches]  # pyright: ignore
    assert bars == pytest.approx(drift(one, other).divergence.tolist(), abs=1e-6)
    turned = other.select(experts=[2, 0, 1])
    turned.header.palette = ["e2", "e0", "e1"]
    again = plots.comparison(one, turned)  # the same experts in another order
    assert_close(heatmaps(again)[1], other.weights.T)
    assert strips(again) == strips(figure)
    assert [bar.get_height() for axes in again.axes for bar in axes.patches] == pytest.approx(bars)  # pyright: ignore
    renamed = record_of(other.scalings, experts=["e1", "x", "y"])
    mixed = strips(plots.comparison(one, renamed))
    paint = expert_colours(["e0", "e1", "e2", "x", "y"])
    rows = zip(renamed.leading.tolist(), confidence_of(renamed.weights).tolist(), strict=True)
    assert mixed[1] == [to_hex(paled(paint[renamed.experts[i]], sure)) for i, sure in rows]
    more = plots.comparison(one, random_record(30, experts=5, layers=2))
    assert [len(array) for array in heatmaps(more)] == [3, 5]
    with pytest.raises(RoutingError, match="the same tokens"):
        plots.comparison(one, random_record(31))


@pytest.mark.parametrize("experts", [1, 2, 12, 13, 64])
@pytest.mark.parametrize("kind", ALL)
def test_labels_stay_apart_and_name_every_expert(kind: str, experts: int) -> None:
    names = [f"an expert of subject {i}" for i in range(experts)]
    record = random_record(40, layers=24, experts=experts)
    record.header.experts = record.header.palette = names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = ALL[kind](record)
        assert overlapping(figure, "y") == []
        if kind in ("layers", "load"):
            assert overlapping(figure, "x") == []
    shown = (
        labels(figure, "x") + labels(figure, "y") + [t.get_text() for one in figure.legends for t in one.get_texts()]
    )
    if kind == "entropy" and experts > NAMED:
        assert len(set(distinct(names)) & set(shown)) == NAMED
        assert f"and {experts - NAMED} more" in shown
    else:
        assert set(distinct(names)) <= set(shown)
    width, height = figure.get_size_inches()
    assert width <= 11
    assert height <= 21


def test_many_layers_are_labelled_where_there_is_room() -> None:
    figure = plots.layers_by_experts(random_record(5, layers=200))
    assert overlapping(figure, "y") == []
    assert heatmaps(figure)[0].shape == (200, 3)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_goes_through_pyplot(kind: str) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    assert isinstance(ALL[kind](random_record()), Figure)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("kind", ALL)
def test_empty_records_and_missing_matplotlib_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RoutingError, match="recorded tokens"):
        ALL[kind](random_record(0, texts=[0]))
    with pytest.raises(RoutingError, match="named by its number"):
        plots.entropy_along(random_record(), sequence=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'loramix\[plot\]'"):
        ALL[kind](random_record())


def test_text_of_any_kind_becomes_a_label() -> None:
    tokenizer = byte_tokenizer()
    text = "a $x$ \\frac{1} 漢 🙂\x07\n\té _^"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    record = record_of(torch.rand(len(ids), 2, 2), tokens=ids, tokenizer=tokenizer, experts=["$\\bad$", "<b>&"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ALL.values():
            kind(record).draw_without_rendering()
        figure = plots.tokens_by_experts(record)
    shown = labels(figure, "x")
    assert {"a", "·", "$", "\\", "□", "↵", "⇥", "…", "é"} <= set(shown)
    assert "$\\bad$" in labels(figure, "y")


def test_labels_are_short_and_layers_without_what_they_share() -> None:
    assert drawable("  two words ") == "··two words·"
    assert drawable("x" * 60) == "xxxxxxxxxx…xxxxxxxxxx"
    assert short_layers(["model.layers.0.q", "model.layers.1.q"]) == ["0.q", "1.q"]
    assert short_layers(["all layers"]) == ["all layers"]
    assert short_layers(["a.b", "a.b.c"]) == ["b", "b.c"]


MACHADO = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
TO_CONES += [[0.0883024619, 0.2817188376, 0.6299787005]]
TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
TO_LAB += [[0.0259040371, 0.7827717662, -0.8086757660]]


def nearest(colours: tuple[str, ...], deficiency: str) -> float:
    """The least distance of two colours in OKLab, as somebody with the deficiency sees them."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(MACHADO[deficiency]).T, 0, 1)
    lab = np.cbrt(seen @ np.array(TO_CONES).T) @ np.array(TO_LAB).T
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(distance[np.triu_indices(len(colours), 1)].min())


@pytest.mark.parametrize("deficiency", MACHADO)
def test_colours_are_told_apart_with_any_colour_vision(deficiency: str) -> None:
    assert len(set(PALETTE)) == 64
    for count, least in ((7, 0.07), (12, 0.07), (24, 0.06), (32, 0.05), (64, 0.035)):
        assert nearest(PALETTE[:count], deficiency) > least


def test_an_expert_keeps_its_colour_in_a_selection() -> None:
    record: RoutingRecord = random_record(experts=5)
    paint = expert_colours(record.select(experts=3).palette)
    assert paint["e3"] == expert_colours(record.experts)["e3"] == PALETTE[3]
    assert len(expert_colours([str(i) for i in range(100)])) == 100
