"""Data sets of detection and segmentation; `choose.py` says which one a folder holds."""
