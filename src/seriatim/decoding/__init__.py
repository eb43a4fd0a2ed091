"""Sampling: targets, proposers, deciders, the one loop."""
