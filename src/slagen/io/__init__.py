"""Everything that comes in and goes out: text, documents with bounds and types, paths, and files written whole."""
