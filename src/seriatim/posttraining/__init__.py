"""What is done to a model after its first training."""
