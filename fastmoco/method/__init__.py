"""Momentum Contrast itself: the step, its state, shuffle-BN and the update."""
