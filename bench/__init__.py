"""Benchmarks: every published number is a row that one of these programs wrote."""
