"""What a frozen encoder is worth: features, kNN and linear classification."""
