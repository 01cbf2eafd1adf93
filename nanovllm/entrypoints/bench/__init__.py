"""Measuring the engine. The command line is in `entrypoints.cli.bench`."""
