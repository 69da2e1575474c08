"""Local Hugging Face folders: read, compared, written."""
