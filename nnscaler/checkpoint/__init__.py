"""Checkpoints: sharded saves, resuming on any mesh, merging, export."""
