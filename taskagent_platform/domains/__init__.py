"""What a model is taught: one package for each domain, and what they share."""
