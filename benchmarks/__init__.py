"""Measurements of speed, memory and accuracy; each module runs as `python -m benchmarks.<module>`."""
