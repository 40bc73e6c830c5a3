"""The benchmarks' structure and arithmetic, at sizes that take no time. No test looks at a time."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from benchmarks import demo, from_nothing, numerics, products, report
from benchmarks.limit import Weights
from benchmarks.models import Models, build
from benchmarks.plots import draw_scaling, panels
from benchmarks.run import WORKS, kept_works, main, preamble
from benchmarks.sizes import SIZES
from safetensors.torch import load_file, save_file

from loramix.timing import Contender, Measurement, interleave, peak_bytes, spread

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The three models of the tiny size."""
    return build(TINY, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def measured(models: Models) -> Iterator[Callable[[str], list[Measurement]]]:
    """What a work measures in as few rounds as show its structure, the demo with one prompt; each work runs once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PROMPTS", dict(list(demo.PROMPTS.items())[:1]))
        yield functools.cache(lambda work: WORKS[work](models, rounds_of(work)))


def rounds_of(work: str) -> int:
    return 1 if work == "start" else 2  # each of its rounds starts three processes


def test_the_limit_is_the_formula_of_the_page() -> None:
    weights = Weights(backbone=100, experts=30, head=50)
    assert weights.forward_limit() == (2 * 100 + 30 + 50) / (100 + 50)
    # A prompt of 3 and 2 new tokens: 4 tokens are read, 2 of them meet the head.
    assert weights.generate_limit(prompt=3, new=2) == (4 * 230 + 2 * 50) / (4 * 100 + 2 * 50)
    # Attention is made in both passes: 2 · blocks · H for each token that is seen.
    assert TINY.attention(seen=3) == 2 * TINY.blocks * TINY.hidden * 3
    assert weights.limit(tokens=3, logits=1, attention=7) == (3 * 244 + 50) / (3 * 107 + 50)


def test_a_cache_has_the_bytes_of_the_formula(models: Models) -> None:
    cache = models.base(input_ids=models.prompt, use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == TINY.cache_bytes(TINY.prompt)


def test_the_weights_are_those_of_the_size(models: Models) -> None:
    hidden, intermediate, kv = TINY.hidden, TINY.intermediate, TINY.hidden * TINY.kv_heads // TINY.heads
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)] + 3 * [(hidden, intermediate)]
    assert models.weights == Weights(
        backbone=TINY.blocks * sum(i * o for i, o in shapes),
        experts=TINY.blocks * TINY.experts * TINY.rank * sum(i + o for i, o in shapes),
        head=hidden * TINY.vocabulary,
    )


def test_rounds_are_interleaved_and_slow_contenders_sit_some_out() -> None:
    calls: list[str] = []
    contenders = [
        Contender("a", lambda: calls.append("a")),
        Contender("b", lambda: calls.append("b")),
        Contender("slow", lambda: calls.append("slow"), every=2),
    ]
    times = interleave(contenders, rounds=3, warm_ups=1)
    assert calls == ["a", "b", "slow", *("a", "b", "slow"), *("b", "a"), *("slow", "a", "b")]
    assert [t is None for t in times["slow"]] == [False, True, False]


def test_slow_contenders_warm_up_once() -> None:
    calls: list[str] = []
    contenders = [Contender("a", lambda: calls.append("a")), Contender("slow", lambda: calls.append("slow"), every=2)]
    interleave(contenders, rounds=0, warm_ups=3)
    assert calls == ["a", "a", "a", "slow"]


def test_the_peak_is_the_most_that_is_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            a = torch.zeros(1000)
            b = torch.zeros(500)
            del a, b

    assert peak_bytes(call) == 4 * 1500


def test_ratios_are_taken_within_a_round() -> None:
    measured = Measurement("m", {"base": [1.0, 10.0, 2.0], "x": [2.0, 30.0, None]})
    ratio = measured.ratio("x")
    assert (ratio.median, ratio.rounds) == (2.5, 2)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == spread([5.0, 3.0, 1.0, 2.0, 4.0])
    assert (spread([1.0, 2.0, 3.0, 4.0, 5.0]).lower, spread([1.0, 2.0, 3.0, 4.0, 5.0]).upper) == (2.0, 4.0)


@pytest.mark.parametrize(
    "work",
    [pytest.param(w, marks=[pytest.mark.slow] if w == "start" else []) for w in WORKS if w != "compiled"],
)
def test_every_work_measures_every_contender(measured: Callable[[str], list[Measurement]], work: str) -> None:
    for found in measured(work):
        assert {"base", "loramix"} <= set(found.samples)
        rounds = rounds_of(work) if found.unit == "s" else 1
        assert all(len(each) == rounds for each in found.samples.values())
        assert found.limit is not None or work in ("demo", "start", "load")
        told = report.tables([found])
        assert all(name.removesuffix(", forward") in told for name in found.samples)
        assert found.facts.get("tokens in common") == found.facts.get("new")
        assert report.table([found]).count("\n") == 2


@pytest.mark.slow
def test_what_is_compiled_is_one_graph(tmp_path: Path) -> None:
    """In a process of its own: pytest's checker of shapes, which users do not have, cannot be traced."""
    target = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.run", "compiled", "--size", "tiny", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--json", str(target)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(target.read_text(encoding="utf-8"))["works"]["compiled"]:
        measured = Measurement(**found)
        assert set(measured.samples) == {"base", "base, eager", "loramix", "loramix, eager"}
        assert set(measured.facts["compile seconds"]) == {"base", "loramix"}


def test_the_run_writes_what_the_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    main(["forward", "growth"], size="tiny", rounds=2, json_file=target)
    assert "limit" in capsys.readouterr().out
    assert list(json.loads(target.read_text(encoding="utf-8"))["works"]) == ["forward", "growth"]
    report.main(target)
    page = target.with_suffix(".md").read_text(encoding="utf-8")
    assert "## Forward" in page
    assert "](figures.svg)" in page
    assert target.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")


def test_growth_is_drawn_with_its_limits(measured: Callable[[str], list[Measurement]], tmp_path: Path) -> None:
    works = {name: measured(name) for name in ("prefill", "ranks", "batch")}
    first, second = panels(works)
    assert [panel.work for panel, _ in first[2]] == ["ranks", "prefill", "batch"]
    assert [panel.work for panel, _ in second[2]] == ["ranks", "batch"]
    draw_scaling(works, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_preamble_names_machine_versions_and_sizes(models: Models) -> None:
    text = report.header(preamble(models))
    assert all(word in text for word in ("torch", "transformers", "peft", "vocabulary 96", "intermediate 48"))


def test_a_work_is_replaced_and_the_others_stay_in_equal_circumstances(models: Models) -> None:
    now = preamble(models)
    earlier = json.loads(json.dumps({**preamble(models), "works": {"forward": []}}))
    earlier["machine"]["load"] = -1.0
    assert kept_works(earlier, now) == {"forward": []}
    assert kept_works({**earlier, "size": {**earlier["size"], "experts": 99}}, now) == {}


def test_the_page_and_the_plot_are_those_of_the_figures(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    shutil.copy(docs / "benchmarks.json", tmp_path)
    report.main(tmp_path / "benchmarks.json")
    for name in ("benchmarks.md", "benchmarks.svg", "benchmarks_scaling.svg"):
        made, committed = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, docs))
        assert made == committed, "run `make docs`"


def test_the_page_of_products_has_a_row_for_each_case() -> None:
    text = products.page(rounds=1, hiddens=(16,), largest=8, models=False)
    assert text.count("| float32 | 16 |") == text.count("| bfloat16 | 16 |") == 3
    assert "if at most 1/32 of its rank columns" in text
    assert len([line for line in text.splitlines() if line.startswith("| 16 |")]) == 4 + 1


def test_the_committed_page_of_products_tells_the_rule_that_is_in_force() -> None:
    docs = Path(__file__).parents[2] / "docs"
    rule = (
        products.page(rounds=1, hiddens=(), largest=8, models=False)
        .partition("So a layer gathers")[2]
        .partition("\n\n")[0]
    )
    assert rule in (docs / "products.md").read_text(encoding="utf-8")


def test_frozen_numerics_are_those_of_the_same_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "frozen.safetensors"
    numerics.freeze(file, only="convolution bias")
    numerics.compare(file, only="convolution bias")
    assert "convolution bias: identical" in capsys.readouterr().out
    frozen = load_file(file)
    frozen["convolution bias/loaded/trained"][0, 0, 0] += 1e-3
    save_file(frozen, file, {"circumstances": json.dumps(numerics.circumstances())})
    numerics.compare(file, only="convolution bias", tolerance=0.1)
    with pytest.raises(typer.Exit):
        numerics.compare(file, only="convolution bias")
    assert "convolution bias: DIFFERS by 0.001 in loaded/trained" in capsys.readouterr().out


def test_a_difference_is_a_number_where_it_can_be_one() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    before = {"same": nan, "nan": nan, "moved": one, "tokens": one.long(), "gone": one, "dtype": one}
    now = {
        "same": nan.clone(),
        "nan": one,
        "moved": one + 0.5,
        "tokens": one.long() + 1,
        "dtype": one.double(),
        "new": one,
    }
    infinite = dict.fromkeys(("nan", "tokens", "gone", "dtype", "new"), float("inf"))
    assert numerics.differences(before, now) == {"same": 0.0, "moved": 0.5, **infinite}


def test_the_table_of_mixtures_from_nothing_is_what_was_measured() -> None:
    docs = Path(from_nothing.DOCS)
    page, result = (docs / "training.md").read_text(), json.loads((docs / "from_nothing.json").read_text())
    assert from_nothing.table(result) in page
    assert {from_nothing.ONE, *from_nothing.MIXTURES} <= {row["name"] for row in result["rows"]}
