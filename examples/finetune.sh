#!/usr/bin/env bash
# Fine-tune the bundled model with SLA on clips that it generates with dense attention, then use the weights.
# For weights that are worth something, give more prompts and steps: docs/finetune.md has curves.
set -euo pipefail
steps=${1:-60}
cat > shapes.txt <<END
a red circle moving right
a blue square falling on a white background
a green triangle growing
a yellow star moving left on a navy background
END
slagen finetune --model tiny-wan --from-dense --self-generate shapes.txt --sparsity 0.95 --steps "$steps" --output tuned
slagen generate "a red circle moving right" --model tiny-wan --weights tuned/sla.safetensors --output tuned.mp4
