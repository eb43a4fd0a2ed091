"""Studies: data, a measure and a claim, but no order of generation of their own. A file each, found by its key.

Such a file has `META` (family "study"), a `CLAIM` whose arms are trials of models that there are already, or trainings,
and `measure(system, ...)`, which gives the figures of a trained system as numbers that JSON takes.
"""
