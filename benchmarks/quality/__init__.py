"""Quality: our step rules against what PEFT users would pick instead, each at its best rate."""
