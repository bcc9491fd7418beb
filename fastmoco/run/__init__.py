"""What a run leaves behind: its directory, checkpoints, records and pictures."""
