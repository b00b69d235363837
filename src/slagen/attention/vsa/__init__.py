"""Video Sparse Attention: a coarse branch among cubes of tokens, gated, and exact attention to the best cubes."""
