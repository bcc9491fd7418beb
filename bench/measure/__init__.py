"""How benchmarks measure: processes in turns, meters, rows."""
