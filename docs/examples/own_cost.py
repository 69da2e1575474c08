"""An own cost: energy of one run, from its sums and the bytes of its weights (Horowitz, 2014)."""

import espalier as esp
from espalier.costs import Counts
from espalier.problem import Metric, Metrics

PICOJOULE = {"macs": 4.6, "bytes": 160.0}  # a float32 multiply-add; a byte from memory, at 45 nm


class Energy(esp.costs.CodeCost):
    metrics = (Metric("energy_uj", "uJ", "min", "predicted"),)

    def __init__(self, family):
        self.space = family.space
        self.counts = Counts(family)

    def estimate_codes(self, codes):
        counts = self.counts.estimate_codes(codes)
        picojoule = sum(price * counts[name] for name, price in PICOJOULE.items())
        return Metrics({"energy_uj": picojoule * 1e-6}, self.metrics)


if __name__ == "__main__":
    family = esp.nets.make("mobilenet", (1, 8, 8), 10)
    energy = Energy(family)
    for scale in (0.0, 0.5, 1.0):
        candidate = family.uniform(scale)
        print(f"{scale:.1f} {energy.estimate([candidate])['energy_uj'][0]:.2f} uJ")
    # esp.search(family, "digits", within={"energy_uj": 20}, costs=[Energy], budget="2min")
