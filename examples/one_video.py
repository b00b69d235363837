"""One video with the bundled model, and where its time went.

python examples/one_video.py
"""

import slagen

result = slagen.generate("a red circle moving right", model="tiny-wan", seed=7, steps=4, output="circle.mp4")
print(f"{result.path}: {result.frames.shape[0]} frames of {result.frames.shape[2]}x{result.frames.shape[1]}")
for stage, seconds in result.report["stages_s"].items():
    print(f"{stage:>8} {seconds:.2f} s")
