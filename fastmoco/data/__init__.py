"""From files to batches: the order of samples, their augmentation, sources and backends."""
