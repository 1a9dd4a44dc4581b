"""What a packed dataset's files and columns are called."""

COLUMN = "input_ids"
PROVENANCE = "packing.json"
DATA_FILE = "data-00000-of-00001.arrow"
