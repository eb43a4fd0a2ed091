"""Networks that contextualise slots, and what they remember."""
