"""LoRA experts as data: their tensors, the modules that they adapt, new experts; what they need of a base model."""
