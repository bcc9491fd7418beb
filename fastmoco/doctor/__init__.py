"""What this machine has and what limits a run: `python -m fastmoco.doctor`."""
