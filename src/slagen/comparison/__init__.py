"""`slagen compare`: attention methods on the same prompt, seed and noise, and two reports beside each other."""
