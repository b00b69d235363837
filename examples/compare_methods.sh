#!/usr/bin/env bash
# Dense attention, SLA and two methods that need no training, on the same prompt, seed and noise.
set -euo pipefail
slagen compare "a red circle moving right" --model tiny-wan --seed 7 --steps 8 --repeats 1 \
  --methods dense,sla,sol,mean --block-m 16 --block-n 16 --output comparison
slagen attention "a red circle moving right" --model tiny-wan --seed 7 --steps 8 --layer 2 --step 4 --output comparison
