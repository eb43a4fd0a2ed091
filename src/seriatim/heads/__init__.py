"""From hidden states to distributions."""
