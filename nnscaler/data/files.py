"""What a packed dataset's files and columns are called."""

COLUMN = "input_ids"
LABELS = "labels"
TOKEN_IDS = "token_ids.json"
PROVENANCE = "packing.json"
DATA_FILE = "data-00000-of-00001.arrow"
