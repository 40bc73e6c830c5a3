"""loramix beside its base model and PEFT's X-LoRA: `python -m benchmarks.run --help`."""
