"""A model over its life: built with PEFT's arguments, copied, interrupted, saved beside others, taken apart."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from loramix import (
    AdapterMismatchError,
    CacheError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    LoraConfig,
    ModelError,
    PeftModel,
    RoutingError,
    SaveError,
    UnsupportedAdapterError,
    XLoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from support.peft_side import PEFT_WARNINGS
from support.tiny import llama, opt, save_expert, tokens

Experts = Callable[[str], dict[str, str]]


def mixture(experts: dict[str, str], base: Any = None, **config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(llama() if base is None else base, XLoraConfig(hidden_size=64, adapters=experts, **config))


@pytest.fixture
def model(experts: Experts) -> Any:
    return mixture(experts("llama"))


def test_saving_into_the_base_models_folder_leaves_its_weights(experts: Experts, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    model = mixture(experts("llama"), AutoModelForCausalLM.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    with pytest.warns(UserWarning, match="left alone"):
        model.save_pretrained(tmp_path, state_dict={})
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_saving_beside_its_own_experts_does_not_overwrite_them(tmp_path: Path) -> None:
    paths = {
        name: save_expert(tmp_path / name, llama(), seed=i, target_modules=["q_proj"]) for i, name in enumerate("ab")
    }
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SaveError, match="no part of a mixture"):
        mixture(paths, llama().bfloat16()).save_pretrained(tmp_path)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_a_lost_expert_is_not_looked_for_in_the_working_directory(
    model: Any, experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "mixture")
    shutil.rmtree(tmp_path / "mixture" / "math")
    shutil.copytree(experts("llama")["code"], tmp_path / "elsewhere" / "math")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(IncompleteCheckpointError, match="'math'"):
        PeftModel.from_pretrained(llama(), tmp_path / "mixture")


def test_relative_expert_paths_outlive_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_expert(tmp_path / "experts" / "one", llama(), target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    model = mixture({"math": "experts/one"})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    model.save_pretrained("mixture")
    assert PeftModel.from_pretrained(llama(), "mixture").peft_config["default"].adapters == {"math": "math"}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_an_exception_left_half_filled_is_refused_until_reset(
    model: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    expected = model(tokens()).logits
    block = model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(), past_key_values=cache)
    with pytest.raises(CacheError, match="interrupted forward"):
        model(tokens(), past_key_values=cache)
    cache.reset()
    assert_close(model(tokens(), past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_static_cache_whose_halves_came_apart_is_refused(model: Any) -> None:
    cache: Any = StaticCache(model.config, max_cache_len=32)
    model(tokens(), past_key_values=cache)
    cache.base.reset()
    with pytest.raises(CacheError, match="9 tokens of the mixture pass, 0 of the scaling pass"):
        model(tokens(2, 1), past_key_values=cache)


def test_a_copy_of_the_model_does_not_continue_its_caches(model: Any) -> None:
    twin = copy.deepcopy(model)
    cache = model(tokens()).past_key_values
    with pytest.raises(CacheError, match="another mixture"):
        twin(tokens(2, 1), past_key_values=cache)


@torch.compiler.set_stance("force_eager")
def test_a_copy_of_a_compiled_model_calls_its_own_forward(model: Any) -> None:
    model.compile(backend="eager")
    twin = copy.deepcopy(model)
    before = twin(tokens()).logits
    model.set_global_scaling_weight(0.0)
    assert torch.equal(twin(tokens()).logits, before)


def test_an_explicit_cache_is_kept_in_training(model: Any) -> None:
    model.train()
    cache = model(tokens(), use_cache=True).past_key_values
    assert model(tokens(2, 1), past_key_values=cache).logits.shape[:2] == (2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prepared_half_precision_base_trains(experts: Experts, dtype: torch.dtype) -> None:
    base = prepare_model_for_kbit_training(llama().to(dtype), use_gradient_checkpointing=True)
    model = mixture(experts("llama"), base).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert model.internal_xlora_classifier.layers[0].weight.grad.abs().sum() > 0


def test_pefts_keyword_arguments_are_taken(experts: Experts, tmp_path: Path) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts("llama"))
    model = get_peft_model(llama(), config, autocast_adapter_dtype=False, low_cpu_mem_usage=True, revision="v2")
    assert model.peft_config["default"].revision == "v2"
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path, torch_device="cpu", ephemeral_gpu_offload=False)
    with pytest.raises(ConfigurationError, match="no_such_option"):
        PeftModel.from_pretrained(llama(), tmp_path, no_such_option=1)
    for peft_config in (config, LoraConfig(target_modules=["q_proj"])):
        assert isinstance(get_peft_model(llama(), peft_config, "default", False), PeftModel)
        with pytest.raises(ConfigurationError, match="no_such_option"):
            get_peft_model(llama(), peft_config, no_such_option=1)
        with pytest.raises(ModelError, match="mixed=True"):
            get_peft_model(llama(), peft_config, mixed=True)


def test_what_a_plain_save_writes(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="5GB")
    expected = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"math", "code", "prose"}
    assert all({path.name for path in (tmp_path / name).iterdir()} == expected for name in model.expert_names)


@pytest.mark.parametrize("unwanted", [{"no_such_option": 1}, {"safe_serialization": False}])
def test_what_a_save_cannot_heed_is_refused_before_it_writes(model: Any, unwanted: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(unwanted))):
        model.save_pretrained(tmp_path / "mixture", **unwanted)
    assert not (tmp_path / "mixture").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("softmax_temperature", 0.0), ("top_k_lora", 9), ("layerwise_scalings", True), ("xlora_depth", 2)],
)
def test_a_configuration_spoilt_by_hand_is_not_saved(field: str, value: Any, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(ConfigurationError, match=field):
        model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, expected)


@pytest.mark.parametrize(("field", "value"), [("softmax_temperature", 0.0), ("top_k_lora", 0), ("top_k_lora", 4)])
def test_a_configuration_spoilt_by_hand_gives_no_numbers(field: str, value: Any, model: Any) -> None:
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(ConfigurationError, match=field):
        model(tokens())


def test_a_given_configuration_counts(model: Any, experts: Experts, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = XLoraConfig.from_pretrained(tmp_path)
    config.top_k_lora = 1
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path, config=config)
    model.set_topk_lora(1)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert loaded.peft_config["default"] is not config

    config.adapters = {name: experts("llama")["code"] for name in ("x", "y", "z")}
    assert PeftModel.from_pretrained(llama(), tmp_path, config=config).expert_names == ["x", "y", "z"]
    config.adapters = {"x": experts("llama")["code"]}
    with pytest.raises(ConfigurationError, match="exactly 3 new ones"):
        PeftModel.from_pretrained(llama(), tmp_path, config=config)
    config.adapters, config.xlora_depth = {}, 2
    with pytest.raises(IncompleteCheckpointError):
        PeftModel.from_pretrained(llama(), tmp_path, config=config)


def test_a_given_configuration_of_an_expert_fits_its_tensors(experts: Experts, tmp_path: Path) -> None:
    folder = experts("llama")["math"]
    config = LoraConfig.from_pretrained(folder)
    config.lora_alpha *= 2
    loaded: Any = PeftModel.from_pretrained(llama(), folder, config=config)
    plain: Any = PeftModel.from_pretrained(llama(), folder)
    assert not torch.equal(loaded(tokens()).logits, plain(tokens()).logits)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, loaded(tokens()).logits)
    for field, value, error in (
        ("r", 64, CorruptCheckpointError),
        ("use_dora", True, IncompleteCheckpointError),
        ("alora_invocation_tokens", [1], UnsupportedAdapterError),
    ):
        wrong = copy.deepcopy(config)
        setattr(wrong, field, value)
        with pytest.raises(error):
            PeftModel.from_pretrained(llama(), folder, config=wrong)


def test_replaced_experts_outlive_the_working_directory(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "mixture")
    save_expert(tmp_path / "experts" / "one", llama(), target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), "mixture", adapters={"math": "experts/one"})
    assert loaded.peft_config["default"].adapters["math"] == str(tmp_path / "experts" / "one")


@pytest.mark.parametrize("where", ["everywhere", "the backbone"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks_survive_the_experts_and_their_leaving(where: str, when: str, experts: Experts) -> None:
    base: Any = llama()
    parts = [""] if where == "everywhere" else ["model", "lm_head"]
    if when == "before":
        dispatch_model(base, dict.fromkeys(parts, "cpu"), force_hooks=True)
    model = mixture(experts("llama"), base)
    if when == "after":
        parts += ["internal_xlora_classifier"] if where == "the backbone" else []
        dispatch_model(base, dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert torch.equal(model(tokens()).logits, mixture(experts("llama"), llama())(tokens()).logits)
    assert torch.equal(model.unload()(tokens()).logits, llama()(tokens()).logits)


def test_experts_without_values_are_not_saved_and_what_was_saved_stays(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    twin = copy.deepcopy(model).to("meta")
    with pytest.raises(SaveError, match="remove_hook_from_module"):
        twin.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, expected)


def test_a_backbone_with_a_forward_of_its_own_is_refused(experts: Experts) -> None:
    base: Any = llama()
    forward = base.model.forward
    base.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ModelError, match="replaced on the object"):
        mixture(experts("llama"), base)
    assert torch.equal(base(tokens()).logits, llama()(tokens()).logits)


def test_hooks_of_the_base_layer_are_called_with_its_own_output(experts: Experts) -> None:
    base: Any = llama()
    layer = base.model.layers[1].self_attn.q_proj
    seen: list[torch.Tensor] = []
    layer.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    model = mixture(experts("llama"), base).train()
    with torch.no_grad():
        expected = mixture(experts("llama"), llama())(tokens()).logits
    out = model(tokens(), labels=tokens())
    assert_close(out.logits, expected)
    out.loss.backward()
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_serves_any_model(kind: str, model: Any, experts: Experts) -> None:
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    own, others = mixture(experts("llama")), mixture(experts("llama"), xlora_depth=1, layerwise_scalings=True)
    for turn in (own, others, own):
        expected = turn(tokens()).logits
        assert_close(turn(tokens(), past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)
        cache.reset()
    with own.disable_adapter():
        plain = own(tokens(), past_key_values=cache).logits
    assert_close(plain, llama()(tokens()).logits, atol=1e-5, rtol=1e-5)
    assert not hasattr(cache, "base")


@pytest.mark.parametrize("values", [[float("nan"), 1.0, 1.0], [1.0, 2.0]])
def test_fixed_scalings_are_numbers_for_each_expert(values: Any, model: Any) -> None:
    with pytest.raises(RoutingError, match="one finite number for each expert"):
        model.fixed_scalings(values)


def test_a_pickled_model_does_not_continue_the_caches_of_its_twin(model: Any) -> None:
    twin = pickle.loads(pickle.dumps(model))
    cache = model(tokens()).past_key_values
    with pytest.raises(CacheError, match="another mixture"):
        twin(tokens(2, 1), past_key_values=cache)


def test_a_training_step_returns_no_cache_to_continue(model: Any) -> None:
    assert model.train()(tokens()).past_key_values is None


def test_a_headless_opt_that_projects_its_output_is_read_at_that_width(tmp_path: Path) -> None:
    base = AutoModel.from_config(opt(word_embed_proj_dim=32).config).eval()
    path = save_expert(tmp_path / "one", base, target_modules=["q_proj"])
    model: Any = get_peft_model(base, XLoraConfig(adapters={"one": path}, hidden_size=32))
    assert model(tokens()).last_hidden_state.shape == (2, 9, 32)


def test_arguments_that_would_be_ignored_are_refused(model: Any, experts: Experts, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="LoraConfig"):
        PeftModel.from_pretrained(llama(), tmp_path, config=LoraConfig())
    with pytest.raises(ConfigurationError, match="which is one expert"):
        PeftModel.from_pretrained(llama(), experts("llama")["math"], adapters={"a": "b"})


def test_a_partial_state_dict_is_completed_from_the_model(model: Any, tmp_path: Path) -> None:
    key = "internal_xlora_classifier.layers.0.bias"
    model.save_pretrained(tmp_path, state_dict={key: torch.full((3,), 7.0)})
    assert PeftModel.from_pretrained(llama(), tmp_path).internal_xlora_classifier.layers[0].bias.tolist() == [7.0] * 3


def test_unload_gives_the_base_model_its_gradients_back(experts: Experts) -> None:
    base = llama()
    base.lm_head.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    mixture(experts("llama"), base).unload()
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before


def test_setters_count_inside_fixed_scalings(model: Any) -> None:
    with model.fixed_scalings([1.0, 1.0, 1.0]):
        strong = model(tokens()).logits
        model.set_global_scaling_weight(0.0)
        assert torch.equal(model(tokens()).logits, llama()(tokens()).logits)
    assert not torch.equal(strong, llama()(tokens()).logits)


def test_all_linear_in_a_saved_configuration_still_tells_a_shallower_base(tmp_path: Path) -> None:
    path = save_expert(tmp_path / "shallow", llama(num_hidden_layers=1), target_modules="all-linear")
    config = LoraConfig.from_pretrained(path)
    config.target_modules = "all-linear"
    config.save_pretrained(path)
    with pytest.raises(AdapterMismatchError, match=r"model\.layers\.1"):
        mixture({"math": path})


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_a_base_with_pefts_layers_is_refused(experts: Experts) -> None:
    import peft

    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="already carries experts"):
        mixture(experts("llama"), wrapped.get_base_model())
