"""Orders of generation."""
