"""One prompt to videos with reports: settings, sampling, estimate, replay, decoding."""
