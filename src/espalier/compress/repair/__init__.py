"""What is mended after a cut, cheapest first.

- `reconstruct`: layers refitted to what the original's gave; examples, no labels, seconds.
- `recalibrate`: batch-norm statistics set anew; not after a reconstruction, which sets its own.
- `finetune`: training with distillation from the original; as long as there is time.
"""

from espalier.compress.repair.finetune import finetune
from espalier.compress.repair.reconstruct import reconstruct
from espalier.train.evaluate import recalibrate

__all__ = ["finetune", "recalibrate", "reconstruct"]
