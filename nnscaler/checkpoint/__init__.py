"""Checkpoints: saving in shards, resuming on any mesh, merging into one file, exporting for transformers."""
