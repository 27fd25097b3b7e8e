"""Training: chat template, base model, prefix-shared packing, fine-tuning and merging."""
