"""Models that do not fit in memory, one layer after another."""
