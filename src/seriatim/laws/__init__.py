"""The conformance suite that every system is held to."""
