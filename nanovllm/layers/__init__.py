"""The parts of a decoder. Plain classes over tensors: built empty, filled through their slots, called directly."""
