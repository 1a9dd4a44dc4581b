"""Measures the machine that it runs on, so that plans for it are made from its own figures."""
