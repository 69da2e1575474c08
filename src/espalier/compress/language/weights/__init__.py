"""Bits and zeros in a transformer's weights."""
