"""Requests, scheduling, the step loop, and text on both sides of it. No torch."""
