"""One LoRA expert as data: its tensors, which modules it adapts, how a new one starts."""
