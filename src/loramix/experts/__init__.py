"""LoRA experts as data: their tensors, the modules that they adapt, new experts; what is read of a base model."""
