"""What each command prints: the result on stdout as text or as JSON, and what goes with it on stderr."""
