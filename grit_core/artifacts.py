"""The adapter folder: PEFT's layout, a `grit.json` manifest and a model card."""
