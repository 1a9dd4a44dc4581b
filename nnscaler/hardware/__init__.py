"""Devices, and the links between them: what the planner knows of a machine, which need not be present."""

from nnscaler.hardware.communication import Link, Timing
from nnscaler.hardware.spec import Hardware, detect_hardware, find_hardware, hardware_names, load_hardware

__all__ = ["Hardware", "Link", "Timing", "detect_hardware", "find_hardware", "hardware_names", "load_hardware"]
