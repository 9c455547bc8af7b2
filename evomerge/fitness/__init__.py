"""Fitness: tasks, their splits, and how a reply becomes a score.

`task` reads task files and keeps the test split sealed; `score` scores examples on an engine;
`results` are the values that come of it, and `objective` is what they add up to.
`evaluate` scores a model folder by itself. Knows nothing of searches or stores.
"""
