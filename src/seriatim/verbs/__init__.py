"""What users do: train, load, generate, evaluate, compare, claim. The command line is a thin layer over these."""
