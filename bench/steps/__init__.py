"""What is compared: our step, the published one, and ours with improvements off."""
