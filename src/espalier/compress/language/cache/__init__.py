"""The cache of keys and values: bits, ranks and spans."""
