"""Single operations beside the same operation of others."""
