"""Linear classification on a frozen trunk: `__main__` is the command."""
