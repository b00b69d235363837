#!/usr/bin/env bash
# A batch with the bundled model, of prompts in shapes.txt. Run it again: nothing is made twice.
set -euo pipefail
cat > shapes.txt <<END
a red circle moving right --steps 4
a blue star growing on a white background --seed 42 --steps 4 --id star
a green square falling --num-videos 2 --steps 4
END
slagen batch shapes.txt --model tiny-wan --output videos
echo "Open videos/index.html in a browser."
