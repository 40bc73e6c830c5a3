"""Train a new LoRA expert, save it in PEFT's format, and put it into a mixture beside others."""

import torch
from transformers import Trainer, TrainingArguments

from loramix import LoraConfig, XLoraConfig, demo, get_peft_model

TEXT = "The moon is made of green cheese. " * 4

torch.manual_seed(0)
tokenizer = demo.tokenizer()
config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(demo.base(), config)
model.print_trainable_parameters()

ids = tokenizer(TEXT)["input_ids"]
arguments = TrainingArguments(
    "moon-training", max_steps=10, per_device_train_batch_size=1, learning_rate=5e-3,
    report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
)  # fmt: skip
losses = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 10)
print(f"mean training loss {losses.train().training_loss:.3f}")
model.save_pretrained("moon")  # PEFT loads this folder too

base = demo.base()
mixture = get_peft_model(
    base, XLoraConfig(hidden_size=base.config.hidden_size, adapters={**demo.experts(), "moon": "moon"}, xlora_depth=1)
)
print("a mixture of", ", ".join(mixture.expert_names))

only_moon = [float(name == "moon") for name in mixture.expert_names]
with mixture.fixed_scalings(only_moon):  # one expert alone, to see what it does
    out = mixture.generate(**tokenizer("The moon is made of", return_tensors="pt"), max_new_tokens=12)
print(tokenizer.decode(out[0], skip_special_tokens=True))
