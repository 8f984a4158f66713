"""Data: sources, safe unpacking, packed splits, batching and augmentation, one module per data set."""
