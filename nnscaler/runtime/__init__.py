"""What generated code and the trainer run on."""
