"""Re-ttention: a static window, and what the last dense step showed of the rest."""
