"""Measuring the machine, so that plans for it rest on its own figures; and profiling training steps."""
