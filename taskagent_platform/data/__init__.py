"""Training data: generate, verify, de-duplicate, balance, split."""
