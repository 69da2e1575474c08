"""What makes up for what was cut: closed forms first, then training."""
