"""The model card, and the way of a model to the Hub; the Hub is a folder here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, errors
from matplotlib.image import imread
from transformers import Trainer, TrainingArguments

import loramix
from loramix import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from loramix.analysis import plots
from loramix.errors import ConfigurationError, CorruptCheckpointError, SaveError, UnsupportedOperationError
from loramix.evaluation.scores import BASE, MIXTURE, UNIFORM, Evaluation, Score
from loramix.formats import describe
from support.mixtures import SPARSE, logits_of, mixture
from support.records import random_record
from support.tiny import llama, qwen3_moe, save_expert

Experts = Callable[[str], dict[str, str]]
NAMES = ["math", "code", "prose"]
GROUPS = ["sums", "a | b_c"]
BASE_ID = "me/tiny-llama"


@dataclass
class Hub:
    """Repositories as folders, and what was asked of the Hub."""

    root: Path
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def folder(self, repo_id: str) -> Path:
        return self.root / (repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_repo(self, _api: HfApi, repo_id: str, **options: Any) -> Any:
        self.folder(repo_id).mkdir(parents=True, exist_ok=True)
        self.asked.append(("create_repo", options))
        return SimpleNamespace(repo_id=str(self.folder(repo_id).relative_to(self.root)))

    def create_branch(self, _api: HfApi, repo_id: str, **options: Any) -> None:
        self.asked.append(("create_branch", options))

    def upload_folder(self, _api: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, self.folder(repo_id), dirs_exist_ok=True)
        self.asked.append(("upload_folder", options))
        return f"commit to {repo_id}"

    def download(self, repo_id: str, filename: str, *, subfolder: str | None, **_options: Any) -> str:
        path = self.folder(repo_id) / (subfolder or "") / filename
        if path.is_file():
            return str(path)
        response = SimpleNamespace(headers={}, request=None)
        raise errors.RemoteEntryNotFoundError("no such file", response=cast(Any, response))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    for name in ("create_repo", "create_branch", "upload_folder"):
        method = getattr(fake, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, _do=method, **options: _do(api, *args, **options))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def base() -> Any:
    model: Any = llama()
    model.config.name_or_path = BASE_ID
    return model


def evaluation(bits: float = 2.0, names: list[str] = NAMES) -> Evaluation:
    """Each row predicts the first group a little worse than the row before it, and the second one better."""
    rows = [BASE, *names, UNIFORM, MIXTURE]
    scores = {
        row: {group: Score(bits + i if group == GROUPS[0] else bits + 9 - i, 10, 20) for group in GROUPS}
        for i, row in enumerate(rows)
    }
    return Evaluation(scores, names)


def picture() -> Any:
    return plots.tokens_by_experts(random_record(experts=3))


def code_in(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


def test_a_mixture_on_the_hub(experts: Experts, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(experts("llama"), base=base(), task_type="CAUSAL_LM", xlora_depth=2, **SPARSE)
    assert model.push_to_hub("mixture", evaluation=evaluation(), routing=picture()) == "commit to me/mixture"
    folder = hub.root / "me" / "mixture"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == BASE_ID
    header = card.data.to_dict()
    assert header["library_name"] == "loramix"
    assert header["base_model_relation"] == "adapter"
    assert header["pipeline_tag"] == "text-generation"
    assert header["tags"] == ["lora", "xlora", "mixture-of-experts", "loramix"]
    assert "license" not in header
    assert card.text.startswith("\n# mixture\n")
    assert f"[{BASE_ID}](https://huggingface.co/{BASE_ID})" in card.text
    assert "| code | 3 | 6 | down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj | 14 | " in card.text
    assert "classifier, 2,179 parameters, depth 2, hidden size 64, width 32" in card.text
    assert "no softmax over all experts; the best 2 of each token; softmax over these" in card.text
    height, width, _ = imread(folder / "routing.png", format="png").shape
    assert width > 2 * height > 200
    assert "![The weight of each expert](routing.png)" in card.text

    base().save_pretrained(hub.root / BASE_ID)
    monkeypatch.chdir(hub.root)  # a folder goes before a repository of that name
    found: dict[str, Any] = {}
    exec(code_in(card.text), found)
    assert torch.equal(logits_of(found["model"].eval()), logits_of(model))


def test_the_table_and_the_results(experts: Experts, tmp_path: Path) -> None:
    measured = evaluation()
    mixture(experts("llama")).create_or_update_model_card(tmp_path, evaluation=measured, repo_id="me/some")
    card = ModelCard.load(tmp_path / "README.md")
    _, _, table = card.text.partition("## Evaluation")
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["|", "sums", "a \\| b_c", "all |"]
    assert [row[0] for row in rows[2:]] == ["| base model", *(f"| {n}" for n in (*NAMES, UNIFORM, MIXTURE, "oracle"))]
    figures = measured.to_dict()["rows"]
    assert rows[2][1] == f"**{figures[BASE]['sums']['bits_per_byte']:.3f}**"
    assert rows[7][2] == f"**{figures[MIXTURE][GROUPS[1]]['bits_per_byte']:.3f}**"
    assert all("**" not in cell for cell in rows[8][1:])
    assert card.data.model_name == "some"
    results: list[EvalResult] = card.data.eval_results or []
    assert [(result.dataset_name, result.metric_type) for result in results] == [
        (group, metric) for group in (*GROUPS, "all") for metric in ("perplexity", "bits_per_byte")
    ]
    assert results[0].metric_value == figures[MIXTURE]["sums"]["perplexity"]


def test_what_the_command_line_printed_is_an_evaluation(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    for folder, given in (("a", evaluation()), ("b", evaluation().to_dict())):
        model.create_or_update_model_card(tmp_path / folder, evaluation=given)
    one, other = ((tmp_path / folder / "README.md").read_bytes() for folder in "ab")
    assert one == other


@pytest.mark.parametrize(
    ("given", "received"),
    [
        (evaluation(names=["x", "code", "prose"]), r"\['x', 'code', 'prose'\]"),
        ({"rows": {}}, "no evaluation"),
        ({"experts": NAMES, "rows": {MIXTURE: {"a": {"loss": 1.0}}}}, "no evaluation"),
        (3.5, "evaluation=3.5"),
    ],
)
def test_another_evaluation_is_refused(given: Any, received: str, experts: Experts, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=received):
        mixture(experts("llama")).create_or_update_model_card(tmp_path, evaluation=given)
    assert not list(tmp_path.iterdir())


def test_a_record_is_drawn_first(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    with pytest.raises(ConfigurationError, match="matplotlib figure") as caught:
        model.create_or_update_model_card(tmp_path, routing=cast(Any, random_record()))
    assert "tokens_by_experts(record)" in caught.value.remedy


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedOperationError, match=r"loramix\[plot\]"):
        picture()


def test_one_expert(experts: Experts, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False)
    model: Any = get_peft_model(base(), config).eval()
    model.push_to_hub("expert", tags=["sums"])
    card = ModelCard.load(hub.root / "me" / "expert" / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert card.data.tags == ["lora", "loramix", "sums"]
    assert "One LoRA expert" in card.text
    assert "| 3 | 6, rslora | q_proj | 2 |" in card.text
    assert "Router" not in card.text
    base().save_pretrained(hub.root / BASE_ID)
    monkeypatch.chdir(hub.root)
    found: dict[str, Any] = {}
    exec(code_in(card.text), found)
    assert torch.equal(logits_of(found["model"].eval()), logits_of(model))


def test_the_card_in_a_folder_loads_it(experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(experts("llama"), base=base(), revision=None)
    model.save_pretrained(tmp_path / "saved")
    model.create_or_update_model_card(tmp_path / "saved")
    base().save_pretrained(tmp_path / "saved" / BASE_ID)
    monkeypatch.chdir(tmp_path / "saved")
    found: dict[str, Any] = {}
    exec(code_in(Path("README.md").read_text()), found)
    assert torch.equal(logits_of(found["model"].eval()), logits_of(model))


def test_a_static_router_and_the_parameters_of_blocks(tmp_path: Path) -> None:
    target = "mlp.experts.gate_up_proj"
    expert = save_expert(tmp_path / "expert", qwen3_moe(), target_modules=["q_proj"], target_parameters=[target])
    model = mixture({"math": expert}, base=qwen3_moe(), router="static", global_scaling_weight=0.5)
    model.save_pretrained(tmp_path / "saved")
    model.create_or_update_model_card(tmp_path / "saved")
    (described,) = describe(tmp_path / "saved").experts
    text = (tmp_path / "saved" / "README.md").read_text()
    assert f"| math | 4 | 8 | gate_up_proj, q_proj | 4 | {described.parameters:,} |" in text
    assert "- Kind: static, 1 parameters" in text
    assert "- Weight of all experts: 0.5" in text


def test_paths_of_this_machine_are_not_told(experts: Experts, hub: Hub, tmp_path: Path) -> None:
    place = hub.root / "user" / "math"
    shutil.copytree(experts("llama")["math"], place)
    local: Any = llama()
    local.config.name_or_path = str(tmp_path / "my-base")
    (tmp_path / "my-base").mkdir()
    sources = experts("llama") | {"math": "user/math@v1"}
    model = mixture(sources, base=local)
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("mixture")
    text = (hub.root / "me" / "mixture" / "README.md").read_text()
    assert "[user/math@v1](https://huggingface.co/user/math)" in text
    assert [path for path in (*sources.values(), str(tmp_path), tmp_path.name, "my-base") if path in text] == [
        "user/math@v1"
    ]
    assert "A model without an id on the Hub" in text
    assert 'from_pretrained("path/to/the/base-model")' in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_a_name_without_an_owner_is_on_the_hub_if_its_cache_says_so(
    experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: Any = llama()
    named.config.name_or_path = "gpt2"
    model = mixture(experts("llama"), base=named)
    for cached in (None, "config.json"):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, _found=cached: _found)
        model.create_or_update_model_card(tmp_path)
        assert ModelCard.load(tmp_path / "README.md").data.base_model == ("gpt2" if cached else None)


OWN_CARD = """---
license: mit
tags:
- mine
model-index:
- name: X-LoRA mixture
  results:
  - task:
      type: text-generation
    dataset:
      name: Mine
      type: me/data
    metrics:
    - type: accuracy
      value: 0.5
      note: by hand
library_name: transformers
---

# Mine

Text — with ünïcode, and <!-- loramix: description --> without an end.
"""


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_users_card_keeps_its_text(line: str, experts: Experts, tmp_path: Path) -> None:
    path, model = tmp_path / "README.md", mixture(experts("llama"))
    path.write_bytes(OWN_CARD.replace("\n", line).encode())
    model.create_or_update_model_card(tmp_path, evaluation=evaluation(), routing=picture())
    first = path.read_bytes()
    card = ModelCard.load(path)
    own = ModelCard(OWN_CARD.replace("\n", line))
    assert card.text.startswith(own.text)
    assert first.count(b"\r\n") == (first.count(b"\n") if line == "\r\n" else 0)
    header = card.data.to_dict()
    assert header["license"] == "mit"
    assert header["library_name"] == "loramix"
    assert header["tags"] == ["mine", "lora", "xlora", "mixture-of-experts", "loramix"]
    model.create_or_update_model_card(tmp_path, evaluation=evaluation(3.0), routing=picture())
    second = ModelCard.load(path)
    assert second.text.startswith(own.text)
    assert second.text.count("## Evaluation") == second.text.count("## Router") == second.text.count("## Routing") == 1
    raw = yaml.safe_load(first.decode().split("---")[1])["model-index"][0]["results"]
    assert raw[0]["metrics"] == [{"type": "accuracy", "value": 0.5, "note": "by hand"}]
    assert len(raw) == 1 + 3
    assert len(second.data.eval_results or []) == 1 + 3 * 2
    model.set_topk_lora(1)
    model.create_or_update_model_card(tmp_path)
    third = ModelCard.load(path)
    assert third.text == second.text.replace("; all experts", "; the best 1 of each token")


def test_a_text_without_a_header_gets_one(experts: Experts, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Notes\n\nMine.", encoding="utf-8-sig")
    mixture(experts("llama")).create_or_update_model_card(tmp_path)
    card = ModelCard.load(path)
    assert card.text.startswith("# Notes\n\nMine.\n\n<!-- loramix: description -->\n")
    assert card.data.to_dict()["library_name"] == "loramix"


@pytest.mark.parametrize("broken", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff", b"---\nmodel-index: 3\n---\n"])
def test_a_card_that_cannot_be_read_is_left_alone(broken: bytes, experts: Experts, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(broken)
    with pytest.raises(CorruptCheckpointError, match=r"README\.md"):
        mixture(experts("llama")).create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == broken


def test_a_picture_of_the_users_is_left_alone(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    (tmp_path / "routing.png").write_bytes(b"mine")
    with pytest.raises(SaveError, match=r"routing\.png"):
        model.create_or_update_model_card(tmp_path, routing=picture())
    assert [path.name for path in tmp_path.iterdir()] == ["routing.png"]
    assert (tmp_path / "routing.png").read_bytes() == b"mine"


def test_a_card_goes_on_from_the_repositorys_or_the_folders(experts: Experts, hub: Hub, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    model.push_to_hub("me/mixture", evaluation=evaluation(), routing=picture())
    path = hub.root / "me" / "mixture" / "README.md"
    path.write_text(path.read_text() + "\nWritten on the Hub.\n")
    before = path.read_text()
    model.push_to_hub("me/mixture", revision="next", commit_message="Again", private=True, token="secret")
    assert path.read_text() == before
    assert hub.asked[-3:] == [
        ("create_repo", {"private": True, "exist_ok": True}),
        ("create_branch", {"branch": "next", "exist_ok": True}),
        (
            "upload_folder",
            {"commit_message": "Again", "commit_description": None, "revision": "next", "create_pr": False},
        ),
    ]
    (tmp_path / "other").mkdir()
    model.create_or_update_model_card(tmp_path / "other", routing=picture())
    model.save_pretrained(tmp_path / "other", push_to_hub=True, commit_message="From a folder", max_shard_size="1GB")
    pushed = hub.root / "me" / "other"
    assert {place.name for place in pushed.iterdir()} >= {"README.md", "routing.png", "adapter_config.json", *NAMES}
    assert '"me/other")' in code_in((pushed / "README.md").read_text())
    assert isinstance(PeftModel.from_pretrained(llama(), str(pushed)), loramix.XLoraModel)


@pytest.mark.parametrize("alone", [False, True])
def test_trainers_write_cards_of_their_own(
    alone: bool, experts: Experts, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer replaces a card; with an expert alone, it then calls `create_or_update_model_card`, as with PEFT's."""
    lora, several = LoraConfig(target_modules=["q_proj"]), XLoraConfig(hidden_size=64, adapters=experts("llama"))
    model: Any = get_peft_model(base(), lora if alone else several)
    model.create_or_update_model_card(tmp_path, routing=picture())
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    Trainer(model=model, args=arguments).create_model_card(model_name="trained")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "trained"
    assert ("One LoRA expert" in card.text) == alone
    model.create_or_update_model_card(tmp_path, routing=picture())
    model.push_to_hub("me/trained", evaluation=None)
    assert (hub.root / "me" / "trained" / "README.md").is_file()
