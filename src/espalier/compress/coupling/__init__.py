"""Which channels of a model must be cut together: labels followed through one run, groups proved."""
