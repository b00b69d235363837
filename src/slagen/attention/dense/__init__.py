"""Dense attention: every query attends to every key."""
