"""Adapters as decisions, when a model is to be tuned."""
