"""Clips to train on: videos as people have them, and the shards they are encoded into."""
