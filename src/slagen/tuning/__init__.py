"""`slagen tune`: a sparsity for each layer, and for parts of the steps, that keeps an error bound at the least cost."""
