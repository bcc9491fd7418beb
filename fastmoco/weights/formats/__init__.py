"""The formats of other programs: one module per format, and the lines that load it there."""
