"""How the encoders move: the optimizers of `optim.name`, the schedule and the momentum update."""
