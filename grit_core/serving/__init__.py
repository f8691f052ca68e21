"""Many adapters on one resident base model: slots, grouped LoRA, rows that share steps."""
