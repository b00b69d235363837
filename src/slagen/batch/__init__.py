"""Many prompts with one model in memory: queue, manifest, contact sheet, Ray workers."""
