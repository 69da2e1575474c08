"""The jobs that people come for: `search` finds the network that fits."""
