"""The report in a browser, from file://: what pointing, clicking and keys do, on a phone, in dark and in light."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix.analysis.inspection import Inspection
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.report.data import choose_tokens
from loramix.analysis.report.parts import contrast
from loramix.analysis.report.report import write_report
from loramix.evaluation.ablation import LeaveOneOut
from support.browser import MISSING, chromium
from support.records import random_record, record_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the report is tested in a browser; missing: {MISSING}"),
]

EVIL = "</script><script>window.broken=1</script><img src=x onerror='window.broken=2'><!--"
NAMES = ["math", "<b>code</b>" + EVIL, "prose"]
TOKENS = 700
NODES = 20_000

Open = Callable[..., Any]


class _Words:
    """A tokenizer of words; the fourth token is half of the character that the fifth one ends."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(EVIL if i == 7 else "\n" if i % 12 == 11 else "�" if i == 3 else f" w{i}" for i in ids).replace(
            "� w4", " é"
        )


class _List:
    """A tokenizer of a few words."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(self.words.__getitem__, ids))


def forked() -> RoutingRecord:
    """Two texts with a beginning in common."""
    record = random_record(9, texts=[5, 4])
    record.header.forks[1] = (0, 3)
    for part in record.parts():
        part.position[5:] += 3
    return record


def in_lines() -> RoutingRecord:
    """Many texts with lines of unequal length."""
    words = ["\n" if i % 40 in (9, 10, 33) else " of" if i % 3 else f" word{i}" for i in range(40)]
    return random_record(40_000, 2, 4, texts=[500] * 80, tokens=[i % 40 for i in range(40_000)], tokenizer=_List(words))


def long_word() -> RoutingRecord:
    """A letter a token, without a place to break the line."""
    tokens = [0] * 3000 + [1] + [2] * 3000
    return random_record(len(tokens), 2, 3, tokens=tokens, tokenizer=_List(["x", "\nend of the word ", "y"]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of several kinds, written once."""
    folder = tmp_path_factory.mktemp("reports")
    scalings = random_record(count=TOKENS, layers=4, experts=3).scalings
    usual = record_of(
        scalings, experts=NAMES, tokenizer=_Words(), tokens=list(range(TOKENS)), texts=[TOKENS - 100, 100]
    )
    losses = LeaveOneOut(2.0, {NAMES[0]: 2.25, NAMES[1]: 1.9, NAMES[2]: 2.0}, TOKENS)
    many = random_record(60, 6, 64)
    made = {
        "usual": Inspection(usual, EVIL, [EVIL, "second"], [EVIL], losses),
        "many": Inspection(many, "64 experts"),
        "one": Inspection(record_of(torch.ones(5, 2, 1)), "one expert"),
        "shared": Inspection(random_record(layers=1, shared=True), "shared"),
        "long": Inspection(random_record(100_000, 2, 4, texts=[1000] * 100), "long"),
        "forked": Inspection(forked()),
        "lines": Inspection(in_lines(), "lines"),
        "long word": Inspection(long_word(), "one long word"),
        "late fork": Inspection(forked().select(tokens=[0, 1, 5, 6])),
        "no expert": Inspection(record_of(torch.eye(3)[[0, 1, 0]][:, None].expand(3, 2, 3)).select(experts=[1, 2])),
        "single": Inspection(random_record(20_000, 2, 4), "one long text without an end of line"),
    }
    for name, inspection in made.items():
        write_report(inspection, folder / f"{name}.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramix.analysis.report.report.choose_tokens", partial(choose_tokens, layer_bytes=4 * 3 * 4))
        write_report(random_record(40, 4, 3), folder / "sampled.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def load(browser: Any, pages: dict[str, Path]) -> Generator[Open]:
    """Open a report; whatever the page complains about, or asks of a server, fails the test."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def run(name: str = "usual", *, width: int = 1200, height: int = 800, scheme: str = "light", **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.extend([request.url] * (not request.url.startswith("file:"))))
        page.goto(pages[name].as_uri())
        return page

    yield run
    for context in contexts:
        context.close()
    assert complaints == []


def token(page: Any, number: int) -> Any:
    return page.locator(".t").nth(number)


def focused(page: Any) -> int:
    return page.evaluate("document.activeElement.token ?? -1")


@pytest.mark.parametrize("name", ["usual", "many", "one", "shared", "long", "single"])
def test_it_loads_and_shows_tokens_without_a_complaint(load: Open, name: str) -> None:
    page = load(name)
    token(page, 4).wait_for()
    assert page.evaluate("window.broken") is None


def test_the_text_is_all_there_and_nothing_of_it_is_markup(load: Open) -> None:
    page = load()
    shown = page.evaluate("[...document.querySelectorAll('.chunk')].map((box) => box.textContent).join('')")
    assert shown == _Words().decode(list(range(TOKENS)))
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("#text img, #text b, #text script, header script, .experts b, .experts img").count() == 0
    assert page.locator("h1").inner_text() == EVIL
    assert EVIL in page.locator(".experts").inner_text()


def test_pointing_shows_the_weights(load: Open, pages: dict[str, Path]) -> None:
    page = load()
    assert page.locator("#tip").is_hidden()
    token(page, 20).hover()
    weights = random_record(count=TOKENS, layers=4, experts=3).weights[20]
    found = dict(
        zip(
            page.locator("#tip .name").all_text_contents(),
            map(float, page.locator("#tip .number").all_text_contents()),
            strict=True,
        )
    )
    assert found == pytest.approx(dict(zip(NAMES, weights.tolist(), strict=True)), abs=0.011)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    first = page.locator("#tip .mark").first.get_attribute("class").split()[1]
    assert first in token(page, 20).get_attribute("class").split(), "the first one has the token's colour"
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_a_pointer_at_rest_is_not_asked_while_keys_go_on(load: Open) -> None:
    page = load("single")
    token(page, 300).scroll_into_view_if_needed()
    page.wait_for_timeout(200)  # what scrolls hides the weights
    token(page, 300).hover()
    assert page.locator("#tip").is_visible()
    token(page, 0).focus()
    page.keyboard.press("PageDown")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    page.wait_for_timeout(100)
    assert page.locator("#tip .piece").inner_text() == f"#{focused(page)}"
    token(page, 5 + focused(page)).hover()
    page.wait_for_function("document.querySelector('#tip .piece').textContent !== `#${document.activeElement.token}`")


def test_a_fork_says_which_text_it_goes_on_with(load: Open) -> None:
    page = load("forked")
    headings = page.locator("#text h3").all_text_contents()
    assert headings == ["text 0", "text 1 · goes on from token 3 of text 0"]
    headings = load("late fork").locator("#text h3").all_text_contents()
    assert headings == ["text 0", "text 1 · from token 5, forked at token 3 of text 0"]


def test_a_token_that_no_expert_leads_has_no_colour(load: Open) -> None:
    page = load("no expert")
    ground = "element => getComputedStyle(element).backgroundColor"
    grounds = [token(page, i).evaluate(ground) for i in range(3)]
    assert grounds[0] == grounds[2] == "rgba(0, 0, 0, 0)" != grounds[1]
    token(page, 0).click()
    assert page.locator("#panel .leads").all_text_contents() == [" no expert"] * 2
    assert page.locator("#panel .weights .number").all_text_contents() == ["0.00", "0.00"]
    token(page, 1).click()
    assert page.locator("#panel .leads").all_text_contents() == [" e1"] * 2


def test_clicking_opens_layers_by_experts(load: Open) -> None:
    page = load()
    token(page, 20).click()
    scalings = random_record(count=TOKENS, layers=4, experts=3).scalings[20]
    cells = [float(text) for text in page.locator("#panel .cell").all_text_contents()]
    assert cells == pytest.approx(scalings.flatten().tolist(), abs=0.011)
    assert page.locator("#panel tbody th").all_text_contents() == ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]
    leads = [NAMES[i] for i in scalings.argmax(-1).tolist()]
    assert page.locator("#panel .leads").all_text_contents() == [f" {name}" for name in leads]
    assert token(page, 20).get_attribute("aria-expanded") == "true"
    page.locator("#close").click()
    assert page.locator("#panel").is_hidden()


def test_the_colour_is_the_leading_experts_and_stronger_where_it_leads_more(load: Open) -> None:
    page = load()
    weights = random_record(count=TOKENS, layers=4, experts=3).weights[:40]
    classes = [token(page, i).get_attribute("class") for i in range(40)]
    assert [int(re.search(r"\be(\d+)", found)[1]) for found in classes] == weights.argmax(-1).tolist()
    levels = [int(re.search(r"\bs(\d)", found)[1]) for found in classes]
    by_weight = sorted(range(40), key=weights.amax(-1).tolist().__getitem__)
    assert [levels[i] for i in by_weight] == sorted(levels)
    assert len(set(levels)) > 2


def test_the_keyboard_alone_is_enough(load: Open) -> None:
    page = load()
    for _ in range(5):
        page.keyboard.press("Tab")
        if focused(page) >= 0:
            break
    assert focused(page) == 0
    assert page.locator("#tip").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page) == 2
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator('.t[tabindex="0"]').count() == 1
    page.keyboard.press("ArrowLeft")
    assert focused(page) == 1
    page.keyboard.press("ArrowDown")
    below = focused(page)
    assert below > 1
    page.keyboard.press("ArrowUp")
    assert focused(page) < below
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()
    heading = page.locator("#panel h2").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel h2").inner_text() != heading
    assert page.locator("#tip").is_hidden(), "the panel has the same already"
    here = focused(page)
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    assert focused(page) == here
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("End")
    assert focused(page) == TOKENS - 1
    page.keyboard.press("PageUp")
    assert focused(page) == TOKENS - 51
    page.keyboard.press("Home")
    assert focused(page) == 0
    page.keyboard.press("PageDown")
    assert focused(page) == 50
    page.keyboard.press("PageUp")
    assert focused(page) == 0


def test_tab_leaves_the_text_again(load: Open) -> None:
    page = load()
    token(page, 3).focus()
    page.keyboard.press("Tab")
    assert focused(page) == -1


@pytest.mark.parametrize("name", ["usual", "many", "one", "shared"])
def test_a_phone_scrolls_in_one_direction_only(load: Open, name: str) -> None:
    page = load(name, width=360, height=740, has_touch=True, is_mobile=True)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    token(page, 4).tap()
    assert page.locator("#panel .weights .number").first.is_visible()
    assert page.evaluate(wide) == 0
    box, sheet = token(page, 4).bounding_box(), page.locator("#panel").bounding_box()
    assert box["y"] + box["height"] <= sheet["y"], "the token lies under its own sheet"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["usual", "many"])
def test_text_has_contrast_in_light_and_dark(load: Open, name: str, scheme: str) -> None:
    page = load(name, scheme=scheme)
    colours = page.evaluate(
        """const drawn = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        [...document.querySelectorAll('.t')].slice(0, 60).map((span) => {
            for (const element of [document.body, span]) {
                drawn.fillStyle = getComputedStyle(element).backgroundColor;
                drawn.fillRect(0, 0, 1, 1);
            }
            const paper = [...drawn.getImageData(0, 0, 1, 1).data].slice(0, 3);
            drawn.fillStyle = getComputedStyle(span).color; drawn.fillRect(0, 0, 1, 1);
            return [paper, [...drawn.getImageData(0, 0, 1, 1).data].slice(0, 3)];
        })"""
    )
    found = [contrast(*(tuple(value / 255 for value in colour) for colour in pair)) for pair in colours]
    assert min(found) >= 4.5
    assert len({tuple(paper) for paper, _ in colours}) > 3
    assert (sum(colours[0][1]) < 384) is (scheme == "light")


def test_shared_scalings_have_one_row_for_all_layers(load: Open) -> None:
    page = load("shared")
    token(page, 2).click()
    assert "One row for all layers" in page.locator("#panel .shared").inner_text()
    assert page.locator("#panel table").count() == 0


def test_sixty_four_experts_stay_readable(load: Open) -> None:
    page = load("many")
    token(page, 2).click()
    assert page.locator("#panel .weights .name").count() == 12
    assert "the 52 others together" in page.locator("#panel").inner_text()
    assert page.locator("#panel tbody tr").count() == 6
    assert page.evaluate("document.querySelector('#panel').scrollWidth <= document.querySelector('#panel').clientWidth")


def test_half_a_character_has_a_mark_and_a_place(load: Open) -> None:
    page = load()
    assert token(page, 3).get_attribute("data-mark") == "▫"
    token(page, 3).click()
    assert "part of a character" in page.locator("#panel h2").inner_text()


def test_a_hundred_thousand_tokens_are_few_elements(load: Open) -> None:
    page = load("long")
    count = "document.querySelectorAll('*').length"
    assert page.evaluate(count) < NODES
    token(page, 0).focus()
    page.keyboard.press("End")
    assert focused(page) == 99_999
    page.wait_for_function("document.querySelectorAll('.t').length < 12000")
    assert page.evaluate(count) < NODES
    for part in (0.25, 0.5, 0.75, 0.1):
        page.evaluate(f"scrollTo(0, {part} * document.body.scrollHeight)")
        page.wait_for_timeout(50)
    page.wait_for_function(f"{count} < {NODES}")


def test_a_token_without_its_layers_leads_to_one_with_them(load: Open) -> None:
    page = load("sampled")
    assert "Layers can be looked at in 4 of the tokens shown" in page.locator(".notes").inner_text()
    token(page, 2).click()
    assert page.locator("#panel table").count() == 0
    page.locator("#panel .jump").click()
    assert focused(page) == 0
    assert page.locator("#panel tbody tr").count() == 4


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)])
@pytest.mark.parametrize("name", ["lines", "long word"])
def test_where_a_jump_goes_is_in_the_window(load: Open, name: str, width: int, height: int) -> None:
    page = load(name, width=width, height=height)
    inside = """() => {
        const at = document.activeElement.getBoundingClientRect(), tip = document.getElementById("tip");
        const beside = tip.getBoundingClientRect();
        const near = Math.min(Math.abs(beside.bottom - at.top), Math.abs(beside.top - at.bottom)) < 60;
        return at.top >= 0 && at.bottom <= innerHeight && !tip.hidden && near;
    }"""
    token(page, 0).focus()
    for key in ("End", "Home", "PageDown", "PageDown"):
        page.keyboard.press(key)
        page.wait_for_timeout(700)
        assert page.evaluate(inside), key
    for share in (0.1, 0.5, 0.25, 0.97):
        page.evaluate("scrollTo(0, 0)")
        strip = page.locator(".strip").first
        strip.click(position={"x": strip.bounding_box()["width"] * share, "y": 10})
        page.wait_for_timeout(700)
        assert page.evaluate(inside), share


def test_a_click_on_the_strip_goes_to_the_place(load: Open) -> None:
    page = load()
    box = page.locator(".strip").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 5)
    assert abs(focused(page) - TOKENS / 2) < 10
