"""Which sample, which augmentation, where the bytes come from, and who executes it."""
