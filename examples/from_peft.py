"""Code written for PEFT's X-LoRA, after changing its one import."""

import torch

# from peft import PeftModel, XLoraConfig, get_peft_model
from loramix import PeftModel, XLoraConfig, get_peft_model

from loramix import demo  # isort: skip - stands for your own base model and adapters

base, tokenizer = demo.base(), demo.tokenizer()
base.config.use_cache = True  # PEFT needs False here

config = XLoraConfig(
    task_type="CAUSAL_LM",
    hidden_size=base.config.hidden_size,
    xlora_depth=2,
    xlora_size=32,
    adapters=demo.experts(),  # PEFT needs the names "0", "1", … here
    enable_softmax=False,
    enable_softmax_topk=True,
    top_k_lora=2,
)
model = get_peft_model(base, config)
model.print_trainable_parameters()
model.eval()

model.enable_scalings_logging()
inputs = tokenizer("The method returns", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=8)
print(tokenizer.decode(text[0], skip_special_tokens=True))
print("forwards by length:", {length: len(log) for length, (_, log) in model.get_bucketed_scalings_log().items()})
model.disable_scalings_logging()
model.clear_scalings_log()

model.set_topk_lora(1)
model.set_global_scaling_weight(0.5)
print("global weight", model.get_global_scaling_weight(), "top-k", model.peft_config["default"].top_k_lora)

with torch.no_grad(), model.disable_adapter():
    plain = model(**inputs).logits
print("disabled equals the base model:", torch.equal(plain, demo.base()(**inputs).logits))

model.save_pretrained("mixture")
loaded = PeftModel.from_pretrained(demo.base(), "mixture").eval()
with torch.no_grad():
    print("loaded equals saved:", torch.equal(loaded(**inputs).logits, model(**inputs).logits))
