"""Fewer and narrower layers: sub-layers, heads, inner units, hidden channels."""
