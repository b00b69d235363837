"""`slagen bench`: the attention operator and the denoising loop, timed against dense and other attention."""
