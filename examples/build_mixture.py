"""Build a mixture from LoRA adapters, save it, load it, generate.

The adapters here are folders that ship with loramix; a Hub id (`user/repo`, `user/repo@revision`) does as well.
"""

from loramix import PeftModel, XLoraConfig, demo, get_peft_model

base = demo.base()  # or AutoModelForCausalLM.from_pretrained("…")
tokenizer = demo.tokenizer()

config = XLoraConfig(
    task_type="CAUSAL_LM",
    hidden_size=base.config.hidden_size,
    adapters=demo.experts(),
    xlora_depth=2,
    xlora_size=64,
    layerwise_scalings=True,  # each adapted layer has scalings of its own
)
model = get_peft_model(base, config)
print("experts:", ", ".join(model.expert_names))
print("adapted layers:", len(model.adapted_modules))
model.print_trainable_parameters()

model.save_pretrained("mixture")
loaded = PeftModel.from_pretrained(demo.base(), "mixture")

inputs = tokenizer("def read_lines(path):\n", return_tensors="pt")
print(tokenizer.decode(loaded.generate(**inputs, max_new_tokens=24)[0], skip_special_tokens=True))

# Replace experts when loading: these names are all new, so they take the places of the old ones, in order.
renamed = {f"new_{name}": folder for name, folder in demo.experts().items()}
print("replaced:", ", ".join(PeftModel.from_pretrained(demo.base(), "mixture", adapters=renamed).expert_names))
