"""Scripts to copy from; run them from the repository, as `python -m examples.demo`."""
