"""Delta attention: a sparse method, corrected by the error at one exact query row of each block."""
