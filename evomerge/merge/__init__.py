"""Merging: a recipe and its models give a plan, and one plan streams into two sinks.

`checkpoint` opens models, `plan` says which tensors come from where and how, `methods` are the
formulas, `disk` writes a checkpoint, `live` writes into a model in memory. Knows nothing of text,
tasks or scores.
"""
