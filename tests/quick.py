"""A runtime whose timings are short: for tests of what is done with them, not of how long things take."""

from espalier.costs import OnnxRuntime

QUICK = OnnxRuntime(seconds=0.02, precision=0.5)
