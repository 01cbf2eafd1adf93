"""What an operator should know of a machine before starting the engine: facts, what follows from them, and a remedy."""
