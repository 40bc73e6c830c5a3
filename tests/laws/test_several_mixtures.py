"""Each of several mixtures on one base model is, bit for bit, what it is on a base model of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from loramix import LoraConfig, PeftModel, get_peft_model
from loramix.analysis import record_routing
from support.mixtures import HARD, SPARSE, far, logits_of, mixture
from support.tiny import ARCHITECTURES, TARGETS, build, llama, qwen3_moe, save_expert, save_experts, tokens

NEW = 6
OTHERS: dict[str, dict[str, Any]] = {
    "shared": {},
    "sparse, layerwise": {**SPARSE, "layerwise_scalings": True, "scaling_pass_value": 0.2},
    "hard": HARD,
    "none": {"gating": "with-none"},
    "static": {"router": "static", "layerwise_scalings": True},
    "prototypes": {"router": "prototypes"},
    "arrow": {"router": "arrow", "layerwise_scalings": True},
    "norm": {"router": "norm", "layerwise_scalings": True},
    "linear": {"router": "linear", "layerwise_scalings": True},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "fewer layers": {"target_modules": ["q_proj"]},
    "other layers": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA and more layers": {"target_modules": [*TARGETS["llama"], "lm_head"], "use_dora": True, "r": 5},
    "LoRA biases": {"target_modules": ["k_proj", "down_proj"], "lora_bias": True, "r": 1},
}

Base = Callable[[], Any]
Watch = Callable[[Any], Any]


def scalings(model: Any) -> Any:
    logits_of(model, tokens(3, 5))
    return model.get_latest_scalings(), model.internal_xlora_scalings


def logged(model: Any) -> Any:
    model.enable_scalings_logging()
    logits_of(model, tokens(1, 4))
    logits_of(model, tokens(2, 5))
    model.disable_scalings_logging()
    return model.get_scalings_log()


def greedy(model: Any) -> Any:
    settings = {"lockstep": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(tokens(), max_new_tokens=NEW, do_sample=False, **settings)
    return out.sequences, *out.logits


def uncached(model: Any) -> Any:
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=False, use_cache=False)


def sampled(model: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=True, temperature=2.0)


def beams(model: Any) -> Any:
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=False, num_beams=3)


def drafted(model: Any) -> Any:
    ways = (None, True, 3, "lookup")
    return [model.generate(tokens(1), max_new_tokens=NEW, do_sample=False, lockstep=way) for way in ways]


def fixed(model: Any) -> Any:
    with model.fixed_scalings([0.5] * len(model.expert_names)):
        return logits_of(model), greedy(model)


def disabled(model: Any) -> Any:
    with model.disable_adapter():
        return logits_of(model)


def recorded(model: Any) -> Any:
    with record_routing(model) as record:
        logits_of(model)
    return record.scalings, record.tokens


def cached(model: Any) -> Any:
    first = model(tokens(), use_cache=True)
    return model(tokens(2, 2, seed=4), past_key_values=first.past_key_values).logits.detach()


def gradient(model: Any) -> Any:
    trained = [parameter for parameter in model.router.parameters() if parameter.is_floating_point()]
    with torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(True)
        loss = model(tokens(), labels=tokens()).loss
        found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else [loss]
    for parameter in trained:
        parameter.requires_grad_(False)
    return [None if each is None else each.detach() for each in found]


def names(model: Any) -> Any:
    members = model.peft_config[model.active_adapter].to_dict()
    return (
        members,
        model.expert_names,
        model.adapted_modules,
        sorted(model.state_dict()),
        model.get_nb_trainable_parameters(),
    )


WATCHES: dict[str, Watch] = {
    w.__name__: w
    for w in (
        scalings,
        logged,
        greedy,
        uncached,
        sampled,
        beams,
        drafted,
        fixed,
        disabled,
        recorded,
        cached,
        gradient,
        names,
    )
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): load_file(p) if p.suffix == ".safetensors" else p.read_text() for p in paths}


def check(base: Base, folders: dict[str, Path], watches: dict[str, Watch], tmp_path: Path) -> Any:
    """Both mixtures on one base model, in turns, against each alone; the model is returned."""
    alone = {name: PeftModel.from_pretrained(base(), folder) for name, folder in folders.items()}
    first, second = folders
    model: Any = PeftModel.from_pretrained(base(), folders[first], first)
    model.load_mixture(folders[second], second)
    for watch in watches.values():
        for name in (first, second, first):
            expected = watch(alone[name])
            with model.use_mixture(name):
                assert same(watch(model), expected), (watch, name)
    for name in folders:
        with model.use_mixture(name):
            written = saved(model, tmp_path / f"of one, {name}")
        assert same(written, saved(alone[name], tmp_path / f"alone, {name}"))
    return model


@pytest.fixture(scope="module")
def first(experts: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts on all linear layers, with layerwise scalings."""
    folder = tmp_path_factory.mktemp("first")
    mixture(experts("llama"), layerwise_scalings=True).save_pretrained(folder)
    return folder


def write(folder: Path, architecture: str, config: dict[str, Any], **experts: Any) -> Path:
    """A saved mixture of two experts."""
    found = save_experts(folder / "experts", architecture, names=("x", "y"), **experts)
    model = mixture(found, architecture, **config)
    if config.get("router") not in (None, "classifier"):
        with torch.no_grad():
            for parameter in model.router.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "mixture")
    return folder / "mixture"


@pytest.mark.filterwarnings("ignore:lockstep=.* has no effect")
@pytest.mark.parametrize("kind", OTHERS)
def test_of_any_router_and_gating(kind: str, first: Path, tmp_path: Path) -> None:
    second = write(tmp_path, "llama", OTHERS[kind], target_modules=["v_proj", "down_proj"])
    watches = WATCHES if kind in ("sparse, layerwise", "linear") else {n: WATCHES[n] for n in ("scalings", "greedy")}
    check(llama, {"a": first, "b": second}, watches, tmp_path)


@pytest.mark.parametrize("kind", EXPERTS)
def test_of_experts_that_adapt_other_layers(kind: str, first: Path, tmp_path: Path) -> None:
    second = write(tmp_path, "llama", {}, **EXPERTS[kind])
    watches = {n: WATCHES[n] for n in ("scalings", "greedy", "gradient")}
    order = {"a": first, "b": second} if kind != "fewer layers" else {"b": second, "a": first}
    check(llama, order, watches, tmp_path)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_on_any_base_model(architecture: str, experts: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    mixture(experts(architecture), architecture).save_pretrained(tmp_path / "a")
    second = write(tmp_path, architecture, {"layerwise_scalings": True}, target_modules=TARGETS[architecture][-1:])
    watches = {n: WATCHES[n] for n in ("scalings", "greedy", "cached")}
    check(ARCHITECTURES[architecture], {"a": tmp_path / "a", "b": second}, watches, tmp_path)


def two(base: Base, folder: Path, *experts: dict[str, Any], **config: Any) -> dict[str, Path]:
    """Two saved mixtures of two experts each."""
    folders: dict[str, Path] = {}
    for name, settings in zip("ab", experts, strict=True):
        place = folder / name
        found = {e: save_expert(place / e, base(), seed=10 * ord(name) + i, **settings) for i, e in enumerate("xy")}
        mixture(found, base=base(), **config).save_pretrained(place / "mixture")
        folders[name] = place / "mixture"
    return folders


def test_on_blocks_of_a_mixture_of_experts_model(tmp_path: Path) -> None:
    one = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    folders = two(qwen3_moe, tmp_path, one, {"target_parameters": ["experts.down_proj"], "target_modules": ["v_proj"]})
    check(qwen3_moe, folders, {n: WATCHES[n] for n in ("scalings", "greedy")}, tmp_path)


def bart() -> Any:
    sides = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 96))}
    heads = {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "eos_token_id": None,
        "forced_eos_token_id": None,
    }
    sizes = {"vocab_size": 96, "d_model": 64, "pad_token_id": 0, "decoder_start_token_id": 1}
    return build(hf.BartForConditionalGeneration, **sizes, **sides, **heads)


def translated(model: Any) -> Any:
    encoded = {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 5, seed=3)}
    logits = model(**encoded).logits.detach()
    return (
        logits,
        model.get_latest_scalings(),
        model.generate(tokens(2, 7), max_new_tokens=NEW, do_sample=False, num_beams=2),
    )


@pytest.mark.filterwarnings("ignore:Passing a tuple")
def test_on_an_encoder_and_a_decoder_of_which_one_mixture_adapts_one(tmp_path: Path) -> None:
    settings = [{"target_modules": ["q_proj", "fc1"]}, {"target_modules": r".*decoder.*(v_proj|fc2)"}]
    settings = [{**each, "task_type": "SEQ_2_SEQ_LM"} for each in settings]
    folders = two(bart, tmp_path, *settings)
    check(bart, folders, {"translated": translated}, tmp_path)


def test_on_a_base_model_without_a_head_that_is_its_own_backbone(tmp_path: Path) -> None:
    def base() -> Any:
        return llama().model

    def hidden(model: Any) -> Any:
        return model(tokens()).last_hidden_state.detach(), model.get_latest_scalings()

    one = {"target_modules": ["q_proj", "up_proj"], "task_type": "FEATURE_EXTRACTION"}
    folders = two(base, tmp_path, one, {**one, "target_modules": ["o_proj", "embed_tokens"]})
    check(base, folders, {"hidden": hidden}, tmp_path)


def expert_with_weights(folder: Path, seed: int, base: Base, scale: float) -> str:
    """An expert that was saved with an embedding and a head that have changed in some rows."""
    model: Any = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            weight.requires_grad_(True)[5 + seed : 9 + seed] *= scale
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:The base model's .* differs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_with_weights_of_its_own(tied: bool, both: bool, experts: Any, tmp_path: Path) -> None:
    """A mixture whose experts bring embeddings and a head has these alone; neither sees the other's."""

    def base() -> Any:
        return llama(tie_word_embeddings=tied)

    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    own = {"e": expert_with_weights(tmp_path / "e", 0, base, 1.5)}
    other = {"f": expert_with_weights(tmp_path / "f", 2, base, 1.25)} if both else experts("llama")
    mixture(own, base=base()).save_pretrained(folders["a"])
    mixture(other, base=base()).save_pretrained(folders["b"])
    watches = {n: WATCHES[n] for n in ("scalings", "greedy", "disabled")}
    for order in (["a", "b"], ["b", "a"]):
        model = check(base, {name: folders[name] for name in order}, watches, tmp_path / order[0])
        model.use_mixture(order[1])
        assert torch.equal(logits_of(model.unload()), logits_of(base()))


THREADS, ROUNDS = 6, 3


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_switching")
def test_threads_use_theirs_at_once(first: Path, tmp_path: Path) -> None:
    second = write(tmp_path, "llama", {**SPARSE, "layerwise_scalings": True}, target_modules=["v_proj", "lm_head"])
    model: Any = PeftModel.from_pretrained(llama(), first, "a")
    model.load_mixture(second, "b")
    work = [greedy, fixed, disabled]
    jobs = [("ab"[i % 2], work[i % 3]) for i in range(THREADS)]
    alone: list[Any] = []
    for name, watch in jobs:
        with model.use_mixture(name):
            alone.append(watch(model))
    start = threading.Barrier(THREADS)

    def run(job: tuple[str, Watch]) -> list[Any]:
        name, watch = job
        start.wait()
        if watch is greedy:  # as a setter
            model.use_mixture(name)
            return [watch(model) for _ in range(ROUNDS)]
        found: list[Any] = []
        for _ in range(ROUNDS):
            with model.use_mixture(name):
                found.append(watch(model))
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, jobs))
    for expected, several in zip(alone, found, strict=True):
        assert all(same(one, expected) for one in several)
    assert model.active_adapter == "a"


def test_each_alone_is_far_from_the_other(first: Path, tmp_path: Path) -> None:
    """So that the laws above tell them apart."""
    second = write(tmp_path, "llama", {}, target_modules=["v_proj"])
    one, other = (logits_of(PeftModel.from_pretrained(llama(), folder)) for folder in (first, second))
    assert far(one, other)
    assert far(one, logits_of(llama()))
