"""A real pretrained model, trained by the service and by plain PEFT on the same real text."""
