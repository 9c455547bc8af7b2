"""evomerge searches for the best way to merge language models.

This module loads nothing heavy: each part of the package is imported where it is used.
"""

__version__ = "0.1.0"
