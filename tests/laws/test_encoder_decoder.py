"""An encoder and a decoder: whose scalings each layer reads, and what must not depend on how a text was computed.

B, S: batch, tokens of the encoder. T: tokens of the decoder.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import dispatch_model, hooks
from torch import Tensor, nn
from torch.testing import assert_close

from loramix import LoraConfig, PeftModel, XLoraConfig, errors, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.analysis import RoutingRecord, record_routing
from loramix.formats import load_adapter
from loramix.training import ScalingPassCache, init_router
from support.mixtures import far
from support.tiny import build, save_expert, tokens

CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}
SIDES: dict[str, Any] = {
    f"{side}_{part}": n
    for side in ("encoder", "decoder")
    for part, n in (("layers", 2), ("ffn_dim", 96), ("attention_heads", 4))
}
WIDTHS: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "pad_token_id": 0, "decoder_start_token_id": 1}
BART: dict[str, Any] = {**WIDTHS, **SIDES, "forced_eos_token_id": None, "eos_token_id": 2, "bos_token_id": 1}
T5: dict[str, Any] = {**WIDTHS, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "eos_token_id": 2}
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
GEMMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
}
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "t5": (hf.T5ForConditionalGeneration, T5),
    "bart": (hf.BartForConditionalGeneration, BART),
    "whisper": (hf.WhisperForConditionalGeneration, WHISPER),
    "t5gemma": (hf.T5GemmaForConditionalGeneration, {"encoder": GEMMA, "decoder": GEMMA, **WIDTHS}),
}


def base_of(name: str) -> Any:
    """A base model whose head is not its embedding: random models with a tied one repeat the token that they read."""
    kind, config = KINDS[name]
    model = build(kind, **config)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(0.2 * torch.randn_like(head.weight))
    return model


OF_ENCODER = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
OF_ENCODER += ("cross_attn.k_proj", "cross_attn.v_proj")

Experts = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """Base -> the folders of its experts a and b, on every linear layer of both parts; written once."""
    known: dict[str, dict[str, str]] = {}

    def of(name: str) -> dict[str, str]:
        if name not in known:
            root, base = tmp_path_factory.mktemp(name), base_of(name)
            settings: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
            known[name] = {one: save_expert(root / one, base, seed=i, **settings) for i, one in enumerate("ab")}
        return known[name]

    return of


def make(adapters: dict[str, str], name: str, **config: Any) -> Any:
    """A mixture whose routing is far from uniform, and whose scaling pass is not the base model's."""
    torch.manual_seed(3)
    settings = {"layerwise_scalings": True, "scaling_pass_value": 0.3, "xlora_dropout_p": 0.0, **config}
    model: Any = get_peft_model(base_of(name), XLoraConfig(hidden_size=64, adapters=adapters, **settings)).eval()
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, folders: Experts) -> Any:
    return make(folders(name), name)


def inputs_of(name: str, rows: int = 2, length: int = 9, target: int = 5) -> dict[str, Tensor]:
    ids = {"decoder_input_ids": tokens(rows, target, seed=2)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 24, generator=torch.Generator().manual_seed(1)), **ids}
    return {"input_ids": tokens(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long), **ids}


def source_of(name: str, **sizes: Any) -> dict[str, Tensor]:
    """What `generate` is given."""
    return {key: value for key, value in inputs_of(name, **sizes).items() if not key.startswith("decoder")}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**inputs, **more).logits


def sees_encoder(path: str) -> bool:
    return ".encoder." in f".{path}" or path.endswith(OF_ENCODER)


@torch.no_grad()
def reference(model: Any, name: str, adapters: dict[str, str], inputs: dict[str, Tensor]) -> Tensor:
    """Two forwards of the whole plain base model: all experts alike, then each token's own scalings, by hooks."""
    paths = model.adapted_modules
    alike = torch.full((1, 1, len(paths), len(adapters)), model.active_peft_config.scaling_pass_value)
    hidden = with_scalings(name, adapters, paths, inputs, alike, alike)[:2]
    return with_scalings(name, adapters, paths, inputs, *(model.router(one).softmax(-1) for one in hidden))[2]


def with_scalings(
    name: str, adapters: dict[str, str], paths: list[str], inputs: dict[str, Tensor], encoder: Tensor, decoder: Tensor
) -> list[Tensor]:
    """The last hidden states of encoder and decoder, and the logits, with these scalings (B, S or T, L, E)."""
    base, experts = base_of(name), [load_adapter(one, folder) for one, folder in adapters.items()]
    for number, path in enumerate(paths):

        def add(layer: Any, args: Any, y: Tensor, number: int = number, path: str = path) -> Tensor:
            own = (encoder if sees_encoder(path) else decoder)[:, :, number]
            for e, expert in enumerate(experts):
                weights = expert.weights[path]
                y = y + own[..., e, None] * expert.scaling(path) * (args[0] @ weights.A.T @ weights.B.T)
            return y

        base.get_submodule(path).register_forward_hook(add)
    found: list[Tensor] = []
    for part in (base.get_encoder(), base.get_decoder()):
        part.register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state))
    logits = base(**inputs, use_cache=False).logits
    return [*found, logits]


def test_a_forward_equals_the_reference(name: str, model: Any, folders: Experts) -> None:
    inputs = inputs_of(name)
    found = logits_of(model, inputs)
    assert_close(found, reference(model, name, folders(name), inputs), **CLOSE)
    assert far(found, logits_of(base_of(name), inputs))


def test_equal_numbers_of_tokens_and_rows_change_nothing(name: str, folders: Experts) -> None:
    if name == "whisper":
        sizes: dict[str, int] = {"rows": 12, "target": 12}
    else:
        sizes = {"rows": 4, "length": 4, "target": 4}
    inputs = inputs_of(name, **sizes)
    model = make(folders(name), name)
    assert_close(logits_of(model, inputs), reference(model, name, folders(name), inputs), **CLOSE)


def test_shared_scalings_equal_the_reference(folders: Experts) -> None:
    model = make(folders("bart"), "bart", layerwise_scalings=False)
    expected = reference(model, "bart", folders("bart"), inputs_of("bart"))
    assert_close(logits_of(model, inputs_of("bart")), expected, **CLOSE)


def test_latest_scalings_are_the_decoders_and_the_log_has_both(name: str, model: Any) -> None:
    model.enable_scalings_logging()
    logits_of(model, inputs_of(name))
    layers, source = len(model.adapted_modules), 12 if name == "whisper" else 9
    assert model.get_latest_scalings().shape == (2, 5, layers, 2)
    assert [entry.shape for entry in model.get_scalings_log()] == [(2, n, layers, 2) for n in (source, 5)]


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached(name: str, model: Any, beams: int) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = [model.generate(**source_of(name), use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], base_of(name).generate(**source_of(name), **settings))


def test_generated_logits_equal_those_of_one_forward(name: str, model: Any) -> None:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    out = model.generate(**source_of(name), return_dict_in_generate=True, **settings)
    whole = logits_of(model, source_of(name) | {"decoder_input_ids": out.sequences[:, :-1]})
    assert_close(torch.stack(out.logits, 1), whole[:, -5:], **CLOSE)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_on_another_device_is_given_copies(
    name: str, moves: bool, folders: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(value: Any, *_: Any, **__: Any) -> Any:  # as accelerate does between two devices
        if isinstance(value, dict | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            made = {key: copied(each) for key, each in pairs}
            return type(value)(made if isinstance(value, dict) else made.values())
        return value.clone() if isinstance(value, Tensor) else value

    same, model = make(folders(name), name), make(folders(name), name)
    if moves:
        monkeypatch.setattr(hooks, "send_to_device", copied)
    parts = ("encoder", "decoder", "lm_head", "shared", "internal_xlora_classifier")
    paths = [path for path, _ in model.named_modules() if path.removeprefix("model.") in parts]
    dispatch_model(model, dict.fromkeys(paths, "cpu") | {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits_of(model, inputs_of(name)), logits_of(same, inputs_of(name)))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    assert torch.equal(model.generate(**source_of(name), **settings), same.generate(**source_of(name), **settings))


def timestamps_of(model: Any, frames: int, **settings: Any) -> Tensor:
    """What a Whisper writes of two sounds, with the times, part after part where they are longer than it reads."""
    config = model.generation_config
    config.no_timestamps_token_id, config.is_multilingual, config.eos_token_id = 60, False, 59
    config.max_initial_timestamp_index, config.return_timestamps = None, True
    features = torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, frames, dtype=torch.long)
    return model.generate(features, attention_mask=mask, return_timestamps=True, max_new_tokens=12, **settings)


@pytest.mark.parametrize("frames", [24, 70])
def test_long_sounds(frames: int, folders: Experts) -> None:
    model = make(folders("whisper"), "whisper")
    found = timestamps_of(model, frames)
    assert torch.equal(found, timestamps_of(model, frames, use_cache=False))
    model.fix_routing([0.3, 0.7])
    fixed = timestamps_of(model, frames)
    merged = timestamps_of(copy.deepcopy(model).merge_and_unload(), frames)
    assert torch.equal(fixed, merged)
    assert fixed.shape != found.shape or not torch.equal(fixed, found)


def test_several_sequences_for_a_text(name: str, model: Any) -> None:
    settings = {"max_new_tokens": 4, "num_beams": 4, "num_return_sequences": 2}
    together = model.generate(**source_of(name), **settings)
    first = {key: value[:1] for key, value in source_of(name).items()}
    assert torch.equal(together[:2], model.generate(**first, **settings))


def test_an_encoder_that_ran_before_hands_on_both_passes(name: str, model: Any) -> None:
    inputs = inputs_of(name)
    with torch.no_grad():
        before = model.get_encoder()(**source_of(name))
    found = logits_of(model, inputs, encoder_outputs=before)
    assert_close(found, logits_of(model, inputs), **CLOSE)
    logits_of(model, inputs_of(name, rows=1))  # another text in between
    assert_close(logits_of(model, inputs, encoder_outputs=before), found, **CLOSE)


def test_other_states_than_the_encoders_are_refused(name: str, model: Any) -> None:
    with torch.no_grad():
        before = model.get_encoder()(**source_of(name))
    plain = hf.modeling_outputs.BaseModelOutput(last_hidden_state=before.last_hidden_state)
    with pytest.raises(errors.RoutingError, match="encoder_outputs"):
        logits_of(model, inputs_of(name), encoder_outputs=plain)
    other = copy.deepcopy(model)
    with pytest.raises(errors.RoutingError, match="this mixture's encoder"):
        logits_of(other, inputs_of(name), encoder_outputs=before)
    with pytest.raises(errors.RoutingError, match="this mixture's encoder"):
        model.get_decoder()(
            inputs_of(name)["decoder_input_ids"], encoder_hidden_states=before.last_hidden_state, use_cache=False
        )
    with pytest.raises(errors.RoutingError, match="no encoder_hidden_states"):
        model.get_decoder()(inputs_of(name)["decoder_input_ids"])


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_changes_nothing(name: str, side: str, folders: Experts) -> None:
    if (name, side) == ("bart", "left"):
        return  # absolute positions
    model, inputs = make(folders(name), name), inputs_of(name)
    pad = (3, 0) if side == "left" else (0, 3)
    padded = {key: nn.functional.pad(inputs[key], pad) for key in ("input_ids", "attention_mask")}
    assert_close(logits_of(model, inputs | padded), logits_of(model, inputs), **CLOSE)


@pytest.mark.parametrize("use_trainable_adapters", [False, True])
def test_checkpointed_gradients_equal_plain_ones(name: str, folders: Experts, use_trainable_adapters: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = make(folders(name), name, use_trainable_adapters=use_trainable_adapters)
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**inputs_of(name)).logits.square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert any("internal_xlora_classifier" in key for key in found[0])
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert gradient.abs().max() > 0, key
        assert_close(found[1][key], gradient, atol=1e-5, rtol=1e-3)


def test_the_encoders_scalings_have_a_gradient(folders: Experts) -> None:
    """The loss is of the decoder; the router's gradient differs from that with the encoder's scalings held."""
    model = make(folders("t5"), "t5")
    gradients: list[Tensor] = []
    for held in (False, True):
        model.zero_grad(set_to_none=True)
        outputs = model.get_encoder()(**source_of("t5"))
        if held:
            for key in ("last_hidden_state", "scalings"):
                setattr(outputs, key, outputs[key].detach())
        model(**inputs_of("t5"), encoder_outputs=outputs).logits.square().mean().backward()
        gradients.append(next(iter(model.router.parameters())).grad.clone())
    assert far(*(gradient / gradients[0].abs().max() for gradient in gradients))


def test_saved_loaded_copied_and_pickled(name: str, model: Any, tmp_path: Path) -> None:
    expected = logits_of(model, inputs_of(name))
    model.save_pretrained(tmp_path)
    for again in (
        PeftModel.from_pretrained(base_of(name), tmp_path),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(logits_of(again, inputs_of(name)), expected)
    plain = model.unload()
    assert torch.equal(logits_of(plain, inputs_of(name)), logits_of(base_of(name), inputs_of(name)))
    assert type(plain.get_encoder()).__mro__[0] is type(base_of(name).get_encoder())


def test_one_expert_alone_and_merged(name: str, folders: Experts) -> None:
    folder = folders(name)["a"]
    alone: Any = PeftModel.from_pretrained(base_of(name), folder).eval()
    expected, mixture = logits_of(alone, inputs_of(name)), make(folders(name), name)
    with mixture.fixed_scalings([1.0, 0.0]):
        assert_close(logits_of(mixture, inputs_of(name)), expected, **CLOSE)
    assert_close(logits_of(alone.merge_and_unload(), inputs_of(name)), expected, atol=1e-4, rtol=1e-4)


def test_a_static_router_needs_one_pass(name: str, folders: Experts) -> None:
    model: Any = get_peft_model(
        base_of(name), XLoraConfig(hidden_size=64, adapters=folders(name), router="static")
    ).eval()
    calls: list[int] = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    blocks = next(module for module in model.get_encoder().modules() if isinstance(module, nn.ModuleList))
    blocks[0].register_forward_hook(lambda *_: calls.append(2))
    found = logits_of(model, inputs_of(name))
    assert calls == [2, 1]
    with model.fixed_scalings([0.5, 0.5]):
        assert_close(logits_of(model, inputs_of(name)), found, **CLOSE)


def test_routing_fixed_from_a_prompt_is_each_layers_own_mean(folders: Experts) -> None:
    model, inputs = make(folders("t5"), "t5"), inputs_of("t5")
    model.enable_scalings_logging()
    logits_of(model, inputs, use_cache=False)
    of_encoder, of_decoder = (entry.mean((0, 1)) for entry in model.get_scalings_log())
    model.fix_routing(prompt=inputs)
    for number, path in enumerate(model.adapted_modules):
        expected = of_encoder if sees_encoder(path) else of_decoder
        assert_close(model.fixed_routing[number], expected[number], **CLOSE)


@pytest.mark.parametrize(
    ("targets", "streams"), [(r".*encoder\..*\.q", [9]), (r".*decoder.*SelfAttention\.q", [5]), (r".*\.k", [9, 5])]
)
def test_experts_on_one_part(targets: str, streams: list[int], tmp_path: Path) -> None:
    """Only where layers see an encoder's tokens are scalings made of them."""
    folder = save_expert(tmp_path / "a", base_of("t5"), target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = make({"a": folder, "b": folder}, "t5")
    model.enable_scalings_logging()
    found = logits_of(model, inputs_of("t5"))
    assert [entry.shape[1] for entry in model.get_scalings_log()] == streams
    assert_close(found, reference(model, "t5", {"a": folder, "b": folder}, inputs_of("t5")), **CLOSE)


def test_widths_that_differ_are_refused_for_a_router_of_hidden_states(tmp_path: Path) -> None:
    def base() -> Any:
        return build(hf.T5GemmaForConditionalGeneration, encoder={**GEMMA, "hidden_size": 32}, decoder=GEMMA, **WIDTHS)

    folder = save_expert(tmp_path / "a", base(), target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    with pytest.raises(errors.ModelError, match="64, 32"):
        get_peft_model(base(), XLoraConfig(hidden_size=64, adapters={"a": folder, "b": folder}))
    model: Any = get_peft_model(
        base(), XLoraConfig(hidden_size=64, adapters={"a": folder, "b": folder}, router="static")
    ).eval()
    assert logits_of(model, inputs_of("t5gemma")).isfinite().all()


def test_experts_train_on_both_parts(name: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model: Any = get_peft_model(base_of(name), config).train()
    model(**inputs_of(name)).logits.square().mean().backward()
    trained = [key for key, p in model.named_parameters() if p.grad is not None]
    assert any(".encoder." in f".{key}" for key in trained)
    assert any(".decoder." in f".{key}" for key in trained)


def test_a_record_holds_both(name: str, model: Any, tmp_path: Path) -> None:
    with record_routing(model) as record:
        out = model.generate(**source_of(name), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = model.generate(**source_of(name), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(out, again)
    source = 12 if name == "whisper" else 9
    lengths = {number: int((record.part.sequence == number).sum()) for number in record.sequences}
    encoder, decoder = record.header.encoder_texts, [n for n in lengths if n not in record.header.encoder_texts]
    assert [lengths[number] for number in encoder] == [source] * 4
    if name == "whisper":  # its generate leaves out the token to start from
        out = nn.functional.pad(out, (1, 0), value=1)
    assert [lengths[number] for number in decoder] == [out.shape[1] - 1] * 4
    for row, number in enumerate(decoder):
        assert record.sequence(number).part.token.tolist() == out[row % 2, :-1].tolist()
        assert_close(record.sequence(number).part.scalings, record.sequence(decoder[row % 2]).part.scalings, **CLOSE)
    record.save(tmp_path)
    assert RoutingRecord.load(tmp_path).header.encoder_texts == encoder


def test_the_stock_trainer_trains_and_loads_the_best(folders: Experts, tmp_path: Path) -> None:
    def base() -> Any:
        return build(hf.T5ForConditionalGeneration, **T5)  # with a tied head, which the trainer ties anew

    model: Any = get_peft_model(base(), XLoraConfig(hidden_size=64, adapters=folders("t5")))
    row = {**{key: value[0] for key, value in source_of("t5", rows=1).items()}, "labels": tokens(1, 5)[0]}
    arguments = hf.Seq2SeqTrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        learning_rate=0.1,
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=6,
        save_steps=1,
        disable_tqdm=True,
        eval_steps=1,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
    )
    before = [parameter.clone() for parameter in model.router.parameters()]
    trainer = hf.Seq2SeqTrainer(model, arguments, train_dataset=[row] * 4, eval_dataset=[row] * 4)
    trainer.train()
    assert not any(torch.equal(one, other) for one, other in zip(before, model.router.parameters(), strict=True))
    assert trainer.predict([row] * 4).predictions.shape[0] == 4
    expected = logits_of(model.eval(), inputs_of("t5"))
    model.save_pretrained(tmp_path / "mixture")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "mixture")
    assert_close(logits_of(loaded, inputs_of("t5")), expected, **CLOSE)


def test_what_needs_one_backbone_is_refused(folders: Experts) -> None:
    model = make(folders("t5"), "t5", scaling_pass_value=0.0)
    with pytest.raises(errors.UnsupportedOperationError, match="encoder's text"):
        ScalingPassCache(model, max_bytes=2**20)
    batch = {**source_of("t5"), "expert_ids": torch.tensor([0, 1])}
    with pytest.raises(errors.UnsupportedOperationError, match="encoder and decoder"):
        init_router(model, "labels", batches=[batch])
    init_router(model, "zeros")


def test_sound_is_classified_by_an_encoder_alone(tmp_path: Path) -> None:
    def base() -> Any:
        return build(hf.WhisperForAudioClassification, **WHISPER)

    targets = ["q_proj", "fc1", "conv1"]
    adapters = {one: save_expert(tmp_path / one, base(), seed=i, target_modules=targets) for i, one in enumerate("ab")}
    model: Any = get_peft_model(base(), XLoraConfig(hidden_size=64, adapters=adapters, router="static")).eval()
    features = source_of("whisper")
    assert far(logits_of(model, features), logits_of(base(), features))
    with pytest.raises(errors.UnsupportedAdapterError, match="conv1"):
        get_peft_model(base(), XLoraConfig(hidden_size=64, adapters=adapters))
    targets.remove("conv1")
    adapters = {one: save_expert(tmp_path / one, base(), seed=i, target_modules=targets) for i, one in enumerate("ab")}
    model = get_peft_model(base(), XLoraConfig(hidden_size=64, adapters=adapters)).eval()
    assert far(logits_of(model, features), logits_of(base(), features))
    assert model.get_latest_scalings().shape == (2, 12, 4, 2)


def test_a_cache_is_continued_and_reset(folders: Experts) -> None:
    model, inputs = make(folders("t5"), "t5"), inputs_of("t5")
    whole = logits_of(model, inputs)
    with torch.no_grad():
        encoded, ids = model.get_encoder()(**source_of("t5")), inputs["decoder_input_ids"]
        rest = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"], "use_cache": True}
        first = model(decoder_input_ids=ids[:, :3], **rest)
        cache = first.past_key_values
        for _ in range(2):
            second = model(decoder_input_ids=ids[:, 3:], past_key_values=cache, **rest)
            assert_close(torch.cat([first.logits, second.logits], 1), whole, **CLOSE)
            cache.reset()
            first = model(decoder_input_ids=ids[:, :3], past_key_values=cache, **rest)
