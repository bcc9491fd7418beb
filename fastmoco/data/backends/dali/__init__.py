"""The `dali` backend: its graph, what its reader processes run, and the engine around both."""
