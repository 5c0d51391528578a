"""lmkit: from raw text to an RLHF-trained language model on the plain Hugging Face stack."""

import os

__version__ = "0.1.0"

# The Hugging Face libraries read these when they are imported, so they are set before any of them can be.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Progress is the tracker's; a bar for every folder read or written would hide it.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
