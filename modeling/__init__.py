"""What travels with a checkpoint: configuration, model, processor and pipeline, on torch and transformers alone."""
