"""Stage 4: write the trained pipeline to weights/tiny-wan, with the model's default settings but no SLA weights yet."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKLWan
from scenes import FPS, NUM_FRAMES, SIZE, vocabulary
from text import MAX_SEQUENCE_LENGTH

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MIB = 30


# How `slagen finetune` tunes it: noise levels as in train_dit.py; also what brings the error down in 60 steps alone.
TRAINING = {
    "steps": 700, "lr": 8e-4, "proj_multiplier": 4.0, "warmup_steps": 6, "decay": 0.4, "batch_size": 8,
    "micro_batch": 8, "log_sigma_mean": 1.39, "log_sigma_std": 1.2, "caption_dropout": 0.1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "tiny-wan")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--flow-shift", type=float, default=4.0)
    args = parser.parse_args()
    for part in (args.work / "pipeline", args.work / "vae"):
        if not part.is_dir():
            raise SystemExit(f"{part} is missing, so {args.out} was not changed. Run the earlier stages first.")
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(args.work / "pipeline", args.out)
    AutoencoderKLWan.from_pretrained(args.work / "vae").half().save_pretrained(
        args.out / "vae"
    )  # refined since, perhaps
    defaults = {
        "width": SIZE,
        "height": SIZE,
        "num_frames": NUM_FRAMES,
        "fps": FPS,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "flow_shift": args.flow_shift,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "vocabulary": vocabulary(),
        "example_prompt": "a red circle moving right on a white background",
        "training": TRAINING,
        "trained_sizes": [{"width": SIZE, "height": SIZE, "num_frames": NUM_FRAMES}],
    }
    (args.out / "slagen.json").write_text(json.dumps(defaults, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 2**20
    print(f"{args.out}: {size:.1f} MiB")
    if size > LIMIT_MIB:
        raise SystemExit(f"the model takes {size:.1f} MiB, but must take at most {LIMIT_MIB} MiB.")


if __name__ == "__main__":
    main()
