"""What recipes are made of: models, texts, tasks, clocks and judges, one file each."""
