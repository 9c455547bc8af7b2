"""Export: a candidate becomes a folder that ships: checkpoint, recipe, model card, report.

The test split is read here and nowhere else: once per exported recipe, on the exported files, for
the winner and the best parent.
"""
