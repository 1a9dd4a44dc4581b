"""The code generator: from a plan to Python source that a person can read."""

from nnscaler.codegen.stage import generate

__all__ = ["generate"]
