"""Delta attention: a sparse method, corrected by what one exact query row of each block tells of it."""
