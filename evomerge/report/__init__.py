"""What people are shown of a stored search: plain data, charts, and one page that can be sent on.

Reads the store alone, and knows nothing of who asks.
"""
