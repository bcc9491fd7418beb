"""The `nvjpeg` backend: its decoder, what its reader processes run, and the engine around both."""
