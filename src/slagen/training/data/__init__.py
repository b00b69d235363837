"""Training data: from videos or prompts to encoded clips in shards."""
