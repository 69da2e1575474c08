"""Tabular benchmarks and the protocol that compares strategies and estimators on them."""
