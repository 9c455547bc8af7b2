"""The service: an HTTP API, a scheduler that works off submitted searches, and a dashboard.

Whoever is asked over the network, and may do what, is decided here; what is done is done by the
packages below.
"""
