"""`slagen doctor`: what this machine can do, and the self-test that owners of a card attach to an issue."""
