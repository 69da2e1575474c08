"""Decisions on a trained model: widths, depth, bits, sparsity; and repair after them."""
