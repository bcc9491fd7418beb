"""Named grids of runs, and their figures beside the paper's numbers."""
