"""The page about a run: HTML and the plots in it."""
