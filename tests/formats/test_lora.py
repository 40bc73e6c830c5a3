"""One expert's files: as PEFT writes them, as PEFT reads ours, and every way in which they can be wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from loramix.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedAdapterError,
)
from loramix.files.hub import HubOptions
from loramix.formats import load_adapter, save_adapter
from loramix.formats.lora import format_tensors
from support.checkpoints import (
    HIDDEN,
    PEFT_EXPERTS,
    edit_config,
    edit_tensors,
    make_expert,
    same_expert,
    tiny_gpt2,
    tiny_llama,
)

WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.q"


@pytest.fixture
def folder(tmp_path):
    """A good expert of two modules, to be broken."""
    save_adapter(tmp_path / "expert", make_expert("math"))
    return tmp_path / "expert"


class TestAgainstPeft:
    @pytest.mark.parametrize("name", PEFT_EXPERTS)
    def test_what_peft_wrote_is_read_whole(self, peft_folder, name):
        expert = load_adapter(name, peft_folder / name)
        assert format_tensors(expert).keys() == load_file(peft_folder / name / WEIGHTS).keys()
        base = tiny_gpt2() if name == "gpt2" else tiny_llama()
        modules = dict(base.named_modules())
        assert expert.weights
        assert set(expert.weights) <= set(modules)
        for path, weights in expert.weights.items():
            assert weights.rank == expert.rank(path)
            assert weights.embedding == path.endswith("embed_tokens")
            assert (weights.magnitude is not None) == (name == "dora")
            assert (weights.bias is not None) == (name == "bias")

    def test_an_adapted_embedding_brings_the_base_s_weight(self, peft_folder):
        expert = load_adapter("embedding", peft_folder / "embedding")
        (name, weight), *others = expert.base_weights.items()
        assert (name, others) == ("model.embed_tokens.weight", [])
        assert torch.equal(weight, tiny_llama().model.embed_tokens.weight)

    @pytest.mark.parametrize("name", PEFT_EXPERTS)
    @pytest.mark.filterwarnings("ignore")
    def test_what_we_wrote_peft_computes_the_same_with(self, peft_folder, tmp_path, name):
        import peft

        save_adapter(tmp_path, load_adapter(name, peft_folder / name))
        make = tiny_gpt2 if name == "gpt2" else tiny_llama
        ids = torch.arange(8).reshape(1, 8)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before, after = (
                peft.PeftModel.from_pretrained(make(), str(place)).eval()(ids).logits
                for place in (peft_folder / name, tmp_path)
            )
            plain = make()(ids).logits
        assert torch.equal(before, after)
        assert not torch.allclose(before, plain, atol=1e-3)

    def test_another_method_is_refused_by_name(self, peft_folder):
        with pytest.raises(UnsupportedAdapterError, match="PREFIX_TUNING") as caught:
            load_adapter("math", peft_folder / "prefix")
        assert "'math'" in caught.value.received
        assert str(peft_folder / "prefix") in caught.value.received


class TestReading:
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_round_trip_is_bit_exact(self, tmp_path, settings, dtype):
        expert = make_expert("math", **settings)
        first = expert.weights[Q0]
        expert.weights[Q0] = type(first)(
            first.A.to(dtype), first.B.to(dtype), bias=first.bias, magnitude=first.magnitude
        )
        save_adapter(tmp_path, expert)
        again = load_adapter("math", tmp_path)
        assert same_expert(expert, again)
        assert again.source == str(tmp_path)

    def test_a_pickle_is_read_without_running_it(self, folder, tmp_path):
        expert = load_adapter("math", folder)
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        assert same_expert(load_adapter("math", folder), expert)

    def test_a_pickle_that_runs_code_is_refused(self, folder, tmp_path):
        class Attack:
            def __reduce__(self):
                return (tmp_path.joinpath("pwned").touch, ())

        torch.save({"x": Attack()}, folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        with pytest.raises(CorruptCheckpointError, match=r"adapter_model\.bin"):
            load_adapter("math", folder)
        assert not (tmp_path / "pwned").exists()

    def test_safetensors_go_before_the_pickle(self, folder):
        (folder / "adapter_model.bin").write_bytes(b"not read")
        load_adapter("math", folder)

    @pytest.mark.parametrize(
        "rename",
        [
            lambda key: key.removeprefix("base_model.model."),
            lambda key: f"base_model.model.{key}",
            lambda key: key.replace(".weight", ".default.weight"),
            lambda key: key.replace(".weight", ".my-expert.weight"),
        ],
        ids=["no prefix", "prefix twice", "adapter name", "other adapter name"],
    )
    def test_older_spellings_of_keys(self, folder, rename):
        expert = load_adapter("math", folder)
        edit_tensors(folder, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
        assert same_expert(load_adapter("math", folder), expert)

    @pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
    def test_spellings_of_the_magnitude(self, tmp_path, suffix):
        expert = make_expert("math", use_dora=True)
        save_adapter(tmp_path, expert)
        edit_tensors(
            tmp_path, lambda tensors: {k + suffix if k.endswith("vector") else k: t for k, t in tensors.items()}
        )
        assert same_expert(load_adapter("math", tmp_path), expert)

    def test_a_subfolder(self, folder):
        expert = load_adapter("math", folder.parent, HubOptions(subfolder="expert"))
        assert same_expert(expert, load_adapter("math", folder))


class TestWrongFiles:
    def test_a_missing_path(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError) as caught:
            load_adapter("math", tmp_path / "gone")
        assert str(tmp_path / "gone") in caught.value.received
        assert "'math'" in caught.value.received

    def test_a_folder_that_holds_no_adapter(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError, match="which has none") as caught:
            load_adapter("math", tmp_path)
        assert "adapter_config.json" in caught.value.rule

    def test_no_weights(self, folder):
        (folder / WEIGHTS).unlink()
        with pytest.raises(CheckpointNotFoundError, match="neither") as caught:
            load_adapter("math", folder)
        assert WEIGHTS in caught.value.rule
        assert "'math'" in caught.value.received

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (lambda data: b"", "an empty file"),
            (lambda data: data[:-10], "SafetensorError"),
            (lambda data: data[:20], "SafetensorError"),
            (lambda data: b"\0" * 100, "SafetensorError"),
            (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        ],
        ids=["empty", "truncated", "cut header", "zeros", "LFS"],
    )
    def test_a_broken_weights_file(self, folder, content, found):
        (folder / WEIGHTS).write_bytes(content((folder / WEIGHTS).read_bytes()))
        with pytest.raises(CorruptCheckpointError, match=found) as caught:
            load_adapter("math", folder)
        assert "'math'" in caught.value.received
        assert str(folder / WEIGHTS) in caught.value.received
        assert "again" in caught.value.remedy

    @pytest.mark.parametrize("content", [[1], {"x": 1}, {1: torch.zeros(1)}, torch.zeros(2)], ids=str)
    def test_a_pickle_of_other_things(self, folder, content):
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(CorruptCheckpointError, match=r"adapter_model\.bin"):
            load_adapter("math", folder)

    def test_a_truncated_pickle(self, folder):
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        data = (folder / "adapter_model.bin").read_bytes()
        (folder / "adapter_model.bin").write_bytes(data[: len(data) // 2])
        (folder / WEIGHTS).unlink()
        with pytest.raises(CorruptCheckpointError, match=r"adapter_model\.bin"):
            load_adapter("math", folder)

    def test_corrupt_json_names_the_expert(self, folder):
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(CorruptCheckpointError, match=r"'math'.*adapter_config\.json"):
            load_adapter("math", folder)

    def test_a_mixture_instead_of_an_expert(self, peft_folder):
        with pytest.raises(CheckpointError, match=r"a mixture .*'xlora'") as caught:
            load_adapter("math", peft_folder / "xlora")
        assert "'math'" in caught.value.received

    def test_a_bad_value_names_the_expert(self, folder):
        edit_config(folder, r=-1)
        with pytest.raises(ConfigurationError, match=r"'math'.*r=-1"):
            load_adapter("math", folder)

    def test_an_unsupported_feature_is_named_before_weights_are_read(self, folder):
        edit_config(folder, alora_invocation_tokens=[1])
        (folder / WEIGHTS).write_bytes(b"never read")
        with pytest.raises(UnsupportedAdapterError, match=r"'math'.*alora_invocation_tokens=\[1\]"):
            load_adapter("math", folder)


class TestWrongTensors:
    def drop(self, part):
        return lambda tensors: {k: t for k, t in tensors.items() if k != f"base_model.model.{Q0}.{part}"}

    def put(self, **parts):
        new = {f"base_model.model.{Q0}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}
        return lambda tensors: tensors | new

    def refused(self, folder, kind, *named):
        with pytest.raises(kind) as caught:
            load_adapter("math", folder)
        assert "'math'" in caught.value.received
        for name in named:
            assert name in caught.value.received
        assert caught.value.remedy
        return caught.value

    @pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
    def test_a_matrix_without_its_partner(self, folder, part):
        edit_tensors(folder, self.drop(part))
        self.refused(folder, IncompleteCheckpointError, Q0, f"no {part}")

    def test_no_tensors_at_all(self, folder):
        edit_tensors(folder, lambda tensors: {})
        self.refused(folder, IncompleteCheckpointError, "0 tensors")

    def test_dora_without_magnitudes(self, folder):
        edit_config(folder, use_dora=True)
        self.refused(folder, IncompleteCheckpointError, Q0, "lora_magnitude_vector")

    def test_a_bias_that_is_missing(self, folder):
        edit_config(folder, lora_bias=True)
        self.refused(folder, IncompleteCheckpointError, Q0, "lora_B.bias")

    @pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B__bias", "lora_embedding_A"])
    def test_tensors_that_the_configuration_does_not_ask_for(self, folder, part):
        edit_tensors(folder, self.put(**{part: torch.ones(HIDDEN)}))
        kind = IncompleteCheckpointError if "embedding" in part else CorruptCheckpointError
        self.refused(folder, kind, Q0, part.replace("__", "."))

    @pytest.mark.parametrize("key", [f"{Q0}.lora_A.bias", f"{Q0}.lora_C.weight", f"{Q0}.lora_E", "x"])
    def test_a_key_that_is_not_lora_s(self, folder, key):
        edit_tensors(folder, lambda tensors: tensors | {f"base_model.model.{key}": torch.ones(2)})
        self.refused(folder, UnsupportedAdapterError, repr(f"base_model.model.{key}"))

    def test_one_tensor_under_two_keys(self, folder):
        edit_tensors(folder, self.put(lora_A__default__weight=torch.ones(2, HIDDEN)))
        self.refused(folder, CorruptCheckpointError, Q0, "lora_A")

    @pytest.mark.parametrize(
        "parts",
        [
            {"lora_A__weight": torch.ones(3, HIDDEN)},
            {"lora_B__weight": torch.ones(HIDDEN, 3)},
            {"lora_A__weight": torch.ones(5, HIDDEN), "lora_B__weight": torch.ones(HIDDEN, 5)},
            {"lora_A__weight": torch.ones(2 * HIDDEN)},
            {"lora_A__weight": torch.ones(2, HIDDEN, dtype=torch.int32)},
            {"lora_A__weight": torch.ones(())},
            {"lora_A__weight": torch.ones(2, HIDDEN, 1, 1)},
        ],
    )
    def test_shapes_that_do_not_go_together(self, folder, parts):
        edit_tensors(folder, self.put(**parts))
        shape = str(tuple(parts["lora_A__weight" if "lora_A__weight" in parts else "lora_B__weight"].shape))
        self.refused(folder, CorruptCheckpointError, Q0, "expected r=2", shape)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, folder, value):
        key = f"base_model.model.{Q0}.lora_B.weight"
        edit_tensors(folder, lambda tensors: tensors | {key: tensors[key].fill_(value)})
        with pytest.raises(CorruptCheckpointError, match="finite") as caught:
            load_adapter("math", folder)
        assert f"'{Q0}'" in caught.value.received

    def test_a_rank_pattern_that_the_tensors_contradict(self, folder):
        edit_config(folder, rank_pattern={"layers.0.q": 7})
        self.refused(folder, CorruptCheckpointError, Q0, "expected r=7", f"(2, {HIDDEN})")
