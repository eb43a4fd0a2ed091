"""Many requests at once: an engine that decodes them as one batch, and a server in front of it."""
