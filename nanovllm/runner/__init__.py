"""The runner: what turns a step's plan into tensors, runs the model, and chooses tokens."""
