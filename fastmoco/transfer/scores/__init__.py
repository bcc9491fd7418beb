"""What predictions are worth: average precision and mean intersection over union."""
