"""The one door to diffusers: Wan pipelines, the attention inside them, and their SLA weights."""
