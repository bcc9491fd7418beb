"""The machine below a run: processor, cores, threads, memory."""
