"""Wan pipelines of diffusers, the attention inside them, and their SLA weights: all that imports diffusers."""

import logging

# diffusers imports bitsandbytes where that is installed, which warns of a kernel that nothing here runs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
