"""Measuring the engine: requests to measure with, and what is measured. The command line is in `entrypoints.cli.bench`."""
