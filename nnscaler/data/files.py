"""What a packed dataset's files and columns are called."""

COLUMN = "input_ids"
LABELS = "labels"
DOCUMENT_STARTS = "document_starts"  # places in a row where a document begins, rising; 0 unless it goes on there
TOKEN_IDS = "token_ids.json"
PROVENANCE = "packing.json"
DATA_FILE = "data-00000-of-00001.arrow"
