"""Train the router of a mixture with the stock Trainer, and see what it learned.

Only the router learns. A few steps on a few lines show the way; `loramix demo` trains one on real text.
"""

import torch
from transformers import Trainer, TrainingArguments

from loramix import XLoraConfig, demo, get_peft_model

LINES = {
    "code": "for name in names:\n    with open(name) as file:\n        lines = file.readlines()\n",
    "math": "Question: Ada has 57 books and gets 68 more. How many books does Ada have now?\n",
}

torch.manual_seed(0)
base, tokenizer = demo.base(), demo.tokenizer()
config = XLoraConfig(hidden_size=base.config.hidden_size, adapters=demo.experts(), xlora_depth=1)
model = get_peft_model(base, config)


def loss_on(text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"] for text in LINES.values())] * 8
arguments = TrainingArguments(
    "router", max_steps=8, per_device_train_batch_size=1, learning_rate=1e-2,
    report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
)  # fmt: skip

before = sum(map(loss_on, LINES.values()))
Trainer(model, arguments, train_dataset=rows).train()
model.eval()
after = sum(map(loss_on, LINES.values()))
print(f"loss {before:.3f} -> {after:.3f}")
assert after < before

for domain, text in LINES.items():
    model(**tokenizer(text, return_tensors="pt"))
    mean = model.get_latest_scalings().mean((0, 1, 2)).tolist()
    print(domain, {name: round(weight, 2) for name, weight in zip(model.expert_names, mean, strict=True)})

model.save_pretrained("mixture")  # the trainer's own checkpoints, in router/, can be loaded and resumed as well
