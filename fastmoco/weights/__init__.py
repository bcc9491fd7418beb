"""Weights in and out: one reader for every file that holds a ResNet, and the formats we write."""
