"""The run time: what generated code imports, and what trains it."""
