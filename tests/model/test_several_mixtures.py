"""Loading, choosing and dropping mixtures on one base model; what is refused; copies, memory and training."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from loramix import PeftModel, XLoraConfig, XLoraModel, create_reference_model, errors, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.evaluation import evaluate
from loramix.evaluation.passages import Passage
from support.mixtures import far, logits_of, mixture
from support.tiny import gpt2, llama, save_expert, save_experts, tokens

Experts = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def folders(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mixtures a, of three experts on all linear layers, and b, of two on other layers."""
    root = tmp_path_factory.mktemp("mixtures")
    others = save_experts(root / "others", "llama", names=("x", "y"), target_modules=["v_proj", "embed_tokens"])
    mixture(experts("llama"), layerwise_scalings=True).save_pretrained(root / "a")
    mixture(others, top_k_lora=1).save_pretrained(root / "b")
    return {"a": root / "a", "b": root / "b"}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Tensor]:
    """The logits of each mixture on a base model of its own."""
    return {name: logits_of(alone(folders[name])) for name in folders}


def alone(folder: Path, **how: Any) -> Any:
    return PeftModel.from_pretrained(llama(), folder, **how)


def both(folders: dict[str, Path], **how: Any) -> Any:
    model: Any = PeftModel.from_pretrained(llama(), folders["a"], "a")
    model.load_mixture(folders["b"], "b", **how)
    return model


def uses(model: Any, expected: Tensor) -> bool:
    return torch.equal(logits_of(model), expected)


def test_the_first_has_a_name_too(folders: dict[str, Path]) -> None:
    model: Any = alone(folders["a"])
    assert (model.mixtures, model.active_adapter) == (["default"], "default")
    model.load_mixture(folders["b"], name="b")
    assert model.mixtures == ["default", "b"]
    named: Any = PeftModel.from_pretrained(llama(), folders["a"], "first")
    assert (named.mixtures, list(named.peft_config)) == (["first"], ["first"])
    with named.use_mixture("first"):
        assert named.active_adapters == ["first"]


def test_it_is_the_same_object_of_the_same_kind(folders: dict[str, Path]) -> None:
    model = both(folders)
    assert isinstance(model, XLoraModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (type(model).__module__, type(model).__qualname__) == (type(llama()).__module__, type(llama()).__qualname__)


def test_what_is_loaded_changes_nothing_until_it_is_used(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model: Any = PeftModel.from_pretrained(llama(), folders["a"], "a")
    modules, keys = list(model.modules()), list(model.state_dict())
    model.load_mixture(folders["b"], "b")
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert list(model.state_dict()) == keys
    assert uses(model, expected["a"])


def test_it_is_a_setter_and_a_context_that_nests(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    model.use_mixture("b")
    assert uses(model, expected["b"])
    with model.use_mixture("a"):
        assert uses(model, expected["a"])
        with model.use_mixture("b"), model.use_mixture("b"):
            assert uses(model, expected["b"])
        assert uses(model, expected["a"])
        model.use_mixture("b")  # until the end of the block
        assert uses(model, expected["b"])
    assert uses(model, expected["b"])
    with pytest.raises(KeyError), model.use_mixture("a"):
        raise KeyError
    assert model.active_adapter == "b"
    model.use_mixture("a")
    assert uses(model, expected["a"])


def test_what_follows_the_mixture_in_use(folders: dict[str, Path]) -> None:
    model = both(folders)
    with model.use_mixture("b"):
        assert list(model.peft_config) == [model.active_adapter] == ["b"]
        assert model.active_peft_config.top_k_lora == 1
        assert model.expert_names == ["x", "y"]
        assert "model.embed_tokens" in model.adapted_modules
        assert model.base_model.expert_names == ["x", "y"]
        assert model.router is model.internal_xlora_classifier
        assert model.get_submodule("model.embed_tokens").stack.members == (0, 1)
    assert model.expert_names == ["math", "code", "prose"]
    assert type(model.get_submodule("model.embed_tokens")) is nn.Embedding
    assert model.base_model.expert_names == model.expert_names


def test_settings_belong_to_one(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    with model.use_mixture("b"):
        model.set_topk_lora(2)
        model.enable_scalings_logging()
        model.fix_routing([1.0, 0.0])
        model.train()
    assert not model.training
    assert not model.model.training
    assert uses(model, expected["a"])
    assert model.get_scalings_log() == []
    assert model.fixed_routing is None
    model.disable_adapter_layers()
    with model.use_mixture("b"):
        assert model.training
        assert model.fixed_routing is not None
        model.eval().unfix_routing()
        model.set_topk_lora(1)
        assert uses(model, expected["b"])


def test_each_thread_uses_its_own(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    with model.use_mixture("b"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(uses, model, expected["a"]).result()  # as it did not choose
        pool.submit(model.use_mixture, "b").result()
        assert pool.submit(uses, model, expected["b"]).result()
    assert uses(model, expected["a"])


def test_a_generation_in_a_thread(folders: dict[str, Path]) -> None:
    model, found = both(folders), list[Tensor]()
    settings = {"max_new_tokens": 5, "do_sample": False}

    def generate() -> None:
        with model.use_mixture("b"):
            found.append(model.generate(tokens(), **settings))

    thread = threading.Thread(target=generate)
    thread.start()
    own = model.generate(tokens(), **settings)
    thread.join()
    assert torch.equal(own, alone(folders["a"]).generate(tokens(), **settings))
    assert torch.equal(found[0], alone(folders["b"]).generate(tokens(), **settings))


def test_gradients_and_checkpoints_of_one_while_another_is_in_use(folders: dict[str, Path]) -> None:
    """The backward runs a block again where the mixture was, whichever is in use by then."""
    model = both(folders, is_trainable=True)
    same = alone(folders["b"], is_trainable=True)
    for each in (model, same):
        with each.use_mixture("b" if each is model else "default"):
            enable_checkpointing(each.train())
            loss = each(tokens(), labels=tokens()).loss
        loss.backward()
    with model.use_mixture("b"):
        found = [parameter.grad for parameter in model.router.parameters()]
    assert all(torch.equal(one, p.grad) for one, p in zip(found, same.router.parameters(), strict=True))


def test_a_cache_that_one_filled_is_refused_by_the_other(folders: dict[str, Path]) -> None:
    model = both(folders)
    cache = model(tokens(), use_cache=True).past_key_values
    with model.use_mixture("b"), pytest.raises(errors.CacheError, match="another mixture filled"):
        model(tokens(2, 1), past_key_values=cache)
    model(tokens(2, 1), past_key_values=cache)


@pytest.mark.parametrize("kind", ["linear", "evidence"])
def test_a_cache_of_one_pass_is_refused_by_the_other_too(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        mixture = alone(folders["a"])
        config = XLoraConfig(adapters={n: str(folders["a"] / n) for n in mixture.expert_names}, router=kind)
        get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    model: Any = PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    model.load_mixture(tmp_path / "two", "two")
    cache = model(tokens(), use_cache=True).past_key_values
    with model.use_mixture("two"), pytest.raises(errors.CacheError, match="another mixture filled"):
        model(tokens(2, 1), past_key_values=cache)
    model(tokens(2, 1), past_key_values=cache)


REFUSED: dict[str, tuple[Callable[[Any, dict[str, Path]], object], type[errors.LoramixError], str]] = {
    "a name that is taken": (lambda m, f: m.load_mixture(f["b"], "a"), errors.ConfigurationError, "name='a'"),
    "no name": (lambda m, f: m.load_mixture(f["b"], ""), errors.ConfigurationError, "a name of its own"),
    "an unknown name": (lambda m, f: m.use_mixture("c"), errors.ConfigurationError, "'c', and mixtures 'a', 'b'"),
    "dropping an unknown name": (lambda m, f: m.unload_mixture("c"), errors.ConfigurationError, "'c'"),
    "dropping what is in use": (lambda m, f: m.unload_mixture("a"), errors.UnsupportedOperationError, "'a', which"),
    "no such folder": (lambda m, f: m.load_mixture("nowhere", "c"), errors.CheckpointNotFoundError, "nowhere"),
    "one expert": (
        lambda m, f: m.load_mixture(f["a"] / "math", "c"),
        errors.UnsupportedOperationError,
        "one LoRA expert, not a mixture",
    ),
    "a setting that cannot be": (
        lambda m, f: m.load_mixture(f["b"], "c", no_such=1),
        errors.ConfigurationError,
        "no_such",
    ),
    "another vocabulary": (
        lambda m, f: m.resize_token_embeddings(99),
        errors.UnsupportedOperationError,
        "resize_token_embeddings.*'a', 'b'",
    ),
    "building on it": (
        lambda m, f: PeftModel.from_pretrained(m, f["b"]),
        errors.UnsupportedOperationError,
        "unload_mixture",
    ),
    "replicas in threads": (
        lambda m, f: m._replicate_for_data_parallel(),
        errors.UnsupportedOperationError,
        "DataPara",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str, folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    call, kind, match = REFUSED[case]
    model = both(folders)
    with pytest.raises(kind, match=match):
        call(model, folders)
    assert model.mixtures == ["a", "b"]
    for name in "ab":
        with model.use_mixture(name):
            assert uses(model, expected[name])


CALLS: dict[str, Callable[[Any, dict[str, Path]], object]] = {
    "load": lambda m, f: m.load_mixture(f["b"], "c"),
    "use": lambda m, f: m.use_mixture("b"),
}


@pytest.mark.parametrize("call", CALLS)
def test_in_what_changes_the_one_in_use_it_is_refused(call: str, folders: dict[str, Path]) -> None:
    model, seen = both(folders), list[Exception]()
    with model.fixed_scalings([1.0, 0.0, 0.0]), pytest.raises(errors.RoutingError, match="inside fixed_scalings"):
        CALLS[call](model, folders)
    with model.disable_adapter(), pytest.raises(errors.RoutingError, match="inside fixed_scalings"):
        CALLS[call](model, folders)

    def inside(*_: Any) -> None:
        try:
            CALLS[call](model, folders)
        except errors.RoutingError as error:
            seen.append(error)

    handle = model.model.layers[0].register_forward_hook(inside)
    logits_of(model)
    handle.remove()
    assert len(seen) == 2  # in both passes
    assert (model.mixtures, model.active_adapter) == (["a", "b"], "a")


def other_base(folder: Path) -> Path:
    """A mixture of a base model with narrower layers."""
    base = llama(intermediate_size=48)
    expert = save_expert(folder / "expert", base, target_modules=["up_proj"])
    mixture({"x": expert}, base=base).save_pretrained(folder / "m")
    return folder / "m"


def truncated(folder: Path) -> Path:
    """A mixture whose last expert's file is cut."""
    experts = save_experts(folder / "e", "llama", names=("x", "y"))
    mixture(experts).save_pretrained(folder / "m")
    file = folder / "m" / "y" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder / "m"


@pytest.mark.parametrize("broken", [other_base, truncated])
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_failure_leaves_the_model_as_it_was(
    broken: Callable[[Path], Path], first: str, folders: dict[str, Path], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    model = both(folders) if first == "two" else PeftModel.from_pretrained(llama(), folders["a"], "a")
    place = broken(tmp_path)
    before = {name: id(value) for name, value in vars(model).items()}
    state = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    with pytest.raises((errors.AdapterError, errors.CheckpointError)):
        model.load_mixture(place, "c")
    assert {name: id(value) for name, value in vars(model).items()} == before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name][0])
        assert parameter.requires_grad == state[name][1]
    assert uses(model, expected["a"])
    model.load_mixture(folders["b"], "c")
    model.use_mixture("c")
    assert uses(model, expected["b"])


def test_weights_of_the_base_model_that_train_are_not_shared(folders: dict[str, Path]) -> None:
    model: Any = alone(folders["a"])
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(errors.UnsupportedOperationError, match="require gradients"):
        model.load_mixture(folders["b"], "b")
    assert model.lm_head.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_offloaded_weights_are_not_shared_and_are_offloaded_afterwards(
    folders: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    model: Any = PeftModel.from_pretrained(accelerate.cpu_offload(llama()), folders["a"], "a")
    with pytest.raises(errors.UnsupportedOperationError, match="offloaded"):
        model.load_mixture(folders["b"], "b")
    assert uses(model, expected["a"])
    model = both(folders)
    accelerate.cpu_offload(model)
    for name in "abab":
        with model.use_mixture(name):
            assert uses(model, expected[name])


class Twice(nn.Linear):
    """A layer that holds its weight a second time, in an object of its own, as those of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.state = linear.weight, SimpleNamespace(weight=linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.state.weight)


def test_a_weight_that_a_layer_holds_twice_is_shared(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    base: Any = llama()
    base.set_submodule("model.layers.0.mlp.up_proj", Twice(base.get_submodule("model.layers.0.mlp.up_proj")))
    model: Any = PeftModel.from_pretrained(base, folders["a"], "a")
    model.load_mixture(folders["b"], "b")
    held = model.get_submodule("model.layers.0.mlp.up_proj.base_layer").state.weight
    with model.use_mixture("b"):
        other = model.get_submodule("model.layers.0.mlp.up_proj").state.weight
        assert other.data_ptr() == held.data_ptr()
        assert uses(model, expected["b"])


def storages(model: Any) -> dict[int, int]:
    """The bytes of the tensors of all mixtures, each storage once."""
    found: dict[int, int] = {}
    for name in model.mixtures:
        with model.use_mixture(name):
            for tensor in (*model.parameters(), *model.buffers()):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def own_bytes(model: Any) -> int:
    return sum(p.nbytes for n, p in model.named_parameters() if ".stacks." in n or n.startswith(model.router.attribute))


def test_the_base_model_is_in_memory_once(folders: dict[str, Path]) -> None:
    one, other = (alone(folders[name]) for name in "ab")
    weights = sum(p.nbytes for p in llama().parameters())
    model = both(folders)
    found = sum(storages(model).values())
    beside = found - weights - own_bytes(one) - own_bytes(other)  # rotary frequencies, and the numbers of rank columns
    assert 0 <= beside < weights / 100
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(storages(copied).values()) == found
    assert sum(storages(model.to(torch.float64)).values()) <= 2 * found


def test_dropping_one_frees_its_memory(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    before = live_bytes()
    model: Any = PeftModel.from_pretrained(llama(), folders["a"], "a")
    one = live_bytes() - before
    model.load_mixture(folders["b"], "b")
    assert live_bytes() - before > one
    model.unload_mixture("b")
    assert model.mixtures == ["a"]
    assert live_bytes() - before <= one
    assert uses(model, expected["a"])
    model.load_mixture(folders["b"], "b")
    with model.use_mixture("b"), pytest.raises(errors.UnsupportedOperationError, match="'a', which this thread uses"):
        model.unload_mixture("a")
    model.use_mixture("b")
    model.unload_mixture("a")
    assert model.mixtures == ["b"]
    assert uses(model, expected["b"])
    with ThreadPoolExecutor(1) as pool:  # a new thread starts with what is there
        assert pool.submit(uses, model, expected["b"]).result()
    assert model.resize_token_embeddings(100).num_embeddings == 100


def live_bytes() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and not each.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_thread_whose_mixture_was_dropped_gets_an_error(
    folders: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    model = both(folders)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.use_mixture, "b").result()
        model.unload_mixture("b")
        with pytest.raises(errors.UnsupportedOperationError, match="'b', which was unloaded meanwhile"):
            pool.submit(logits_of, model).result()
        pool.submit(model.use_mixture, "a").result()
        assert pool.submit(uses, model, expected["a"]).result()


def test_loading_while_others_run(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model: Any = PeftModel.from_pretrained(llama(), folders["a"], "a")
    names = ["b", "c", "d"]

    def run(name: str) -> bool:
        if name == "a":
            return all(uses(model, expected["a"]) for _ in range(15))
        model.load_mixture(folders["b"], name)
        with model.use_mixture(name):
            return uses(model, expected["b"])

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(run, ["a", *names, "a"]))
    assert sorted(model.mixtures) == ["a", *names]


def test_on_a_model_that_accelerate_has_put_on_devices(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    base = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    model: Any = PeftModel.from_pretrained(base, folders["a"], "a")
    model.load_mixture(folders["b"], "b")
    for name in "aba":
        with model.use_mixture(name):
            assert uses(model, expected[name])


def test_a_third(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    model.use_mixture("b")
    model.load_mixture(folders["a"], "c")
    for name, same in {"a": "a", "b": "b", "c": "a"}.items():
        with model.use_mixture(name):
            assert uses(model, expected[same])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str, folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    with model.use_mixture("b"):
        copied = COPIES[how](model)
        assert uses(copied, expected["b"])
        cache = model(tokens(), use_cache=True).past_key_values
        with pytest.raises(errors.CacheError):
            copied(tokens(2, 1), past_key_values=cache)
    assert copied.mixtures == ["a", "b"]
    copied.use_mixture("a")
    assert uses(copied, expected["a"])
    copied.use_mixture("b")
    copied.unload_mixture("a")
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    for name in "ab":
        with model.use_mixture(name):
            assert uses(model, expected[name])


def test_another_dtype_is_that_of_all(folders: dict[str, Path]) -> None:
    model = both(folders).to(torch.bfloat16)
    for name in "ab":
        same = alone(folders[name]).to(torch.bfloat16)
        with model.use_mixture(name):
            assert uses(model, logits_of(same))
            assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in same.named_parameters()}


def test_a_reference_is_of_the_one_in_use(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model = both(folders)
    with model.use_mixture("b"):
        reference: Any = create_reference_model(model)
        expert = model.get_parameter("model.embed_tokens.stacks.0.lora_A")
    assert reference.mixtures == ["b"]
    assert uses(reference, expected["b"])
    assert reference.get_parameter("model.embed_tokens.stacks.0.lora_A") is expert


def test_unload_and_merge_take_out_all(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    model, plain = both(folders), logits_of(llama())
    assert model.unload() is model
    assert type(model) is type(llama())
    assert uses(model, plain)
    assert list(model.state_dict()) == list(llama().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model, same = both(folders), alone(folders["b"])
    model.use_mixture("b")
    for each in (model, same):
        each.fix_routing([0.25, 0.75])
        each.merge_and_unload()
    assert uses(model, logits_of(same))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert far(logits_of(model), plain)


def test_modules_that_are_set_are_those_of_the_one_in_use(
    folders: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    model = both(folders)
    with model.use_mixture("b"):
        model.lm_head = nn.Linear(64, 7)
        model.extra = nn.Parameter(torch.ones(2))
        model.register_buffer("more", torch.ones(3))
        model.more = torch.zeros(3)
        assert logits_of(model).shape[-1] == 7
        assert {"extra", "more"} <= set(model.state_dict())
        assert not model.more.any()
        del model.extra
    assert "more" not in model.state_dict()
    with pytest.raises(AttributeError, match="more"):
        _ = model.more
    assert uses(model, expected["a"])


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = tokens(8, 10, seed=3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model: Any, folder: Path) -> list[float]:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    runner = Trainer(model=model, args=settings, train_dataset=Texts())
    runner.train()
    runner.save_model(str(folder / "last"))
    return [entry["loss"] for entry in runner.state.log_history if "loss" in entry]


def test_the_one_in_use_trains_and_is_what_trainer_saves(
    folders: dict[str, Path], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    model, same = both(folders, is_trainable=True), alone(folders["b"], is_trainable=True)
    model.use_mixture("b")
    assert train(model, tmp_path / "of two") == train(same, tmp_path / "alone")
    assert uses(model.eval(), logits_of(same.eval()))
    for place in ("last", "checkpoint-2"):
        written, like = (alone(tmp_path / root / place) for root in ("of two", "alone"))
        assert written.expert_names == ["x", "y"]
        assert uses(written, logits_of(like))
    with model.use_mixture("a"):
        assert uses(model, expected["a"])
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_evaluation_is_of_the_one_in_use(folders: dict[str, Path]) -> None:
    passages = [Passage(tokens(1, 9, seed=i)[0].tolist(), [name] * 8, [1] * 8) for i, name in enumerate("xy")]
    model = both(folders)
    expected = evaluate(alone(folders["b"]), passages).to_dict()
    with model.use_mixture("b"):
        assert evaluate(model, passages).to_dict() == expected


def test_of_another_class_of_base_model(experts: Experts, tmp_path: Path) -> None:
    mixture(experts("gpt2"), "gpt2").save_pretrained(tmp_path / "a")
    model: Any = PeftModel.from_pretrained(gpt2(), tmp_path / "a")
    model.load_mixture(tmp_path / "a", "b")
    with model.use_mixture("b"):
        assert uses(model, logits_of(PeftModel.from_pretrained(gpt2(), tmp_path / "a")))
