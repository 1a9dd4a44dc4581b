"""From a plan to Python source."""

from nnscaler.codegen.source import generate

__all__ = ["generate"]
