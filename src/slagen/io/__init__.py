"""Input and output: text, documents with bounds and types, paths, and files that are written whole."""
