"""Graders: what a reply is worth, given its item. Knows nothing of engines.

A grader is a part of a task file, so that its options stand with what it does. Each family has a
module of its own; `AnyGrader` is what a task file may name, by its `kind`.
"""

from evomerge.fitness.graders.composed import MajorityAtK, OneReply, PassAtK
from evomerge.fitness.graders.grader import Grade, Grader

AnyGrader = OneReply | PassAtK | MajorityAtK

__all__ = ["AnyGrader", "Grade", "Grader"]
