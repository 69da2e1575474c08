"""Fewer experts: chosen, merged, refitted."""
