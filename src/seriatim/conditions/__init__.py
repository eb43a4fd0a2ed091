"""What a sample is conditioned on."""
