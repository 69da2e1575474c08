"""Which channels of a model must be cut together: labels followed through one run, groups proved.

torch-pruning's dependency graph, which the tests hold the groups of common networks against, follows
the operators of a backward graph. Here the channels' own labels are followed, so that
heads, grouped queries, turned tensors and norms written by hand keep their channels together, and a group
counts only if a network cut by it gives what the whole network gives with those channels silenced.
"""
