"""SLA2: a learned router chooses the key blocks, and a learned weight mixes the two branches."""
