"""The first minutes on a GPU, in four stages that fit into short calls."""
