"""A model taken to pieces that run alone, for tables of costs."""
