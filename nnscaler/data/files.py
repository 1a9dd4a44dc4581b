"""What a packed dataset's files and columns are called."""

COLUMN = "input_ids"
LABELS = "labels"
DOCUMENT_STARTS = "document_starts"  # places in a row where a document begins, rising; 0 unless it goes on there
TOKEN_IDS = "token_ids.json"
PROVENANCE = "packing.json"
DATA_FILE = "data-00000-of-00001.arrow"
UNFINISHED = "unfinished-"  # begins the name of a file that says how far a dataset has been written


def is_url(path: str) -> bool:
    """Whether fsspec opens it by its kind, such as hf:// or s3://; else it is a local path."""
    return "://" in path
