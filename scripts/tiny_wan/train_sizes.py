"""Stage 3, continued: train a pipeline's transformer on longer and larger clips too, with dense attention.

It needs only the weights in a diffusers folder (float16 is enough). It writes a copy of that folder with the new
transformer and without SLA weights, because those fit only the transformer that they were trained with. Each step uses
clips of one size. The text encoder and the VAE do not change.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from common import Ema, autocast, best_device, load_state, log, make_optimizers, save_state, save_tensors, sigmas
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from encode import held_out_scenes
from scenes import SIZES, Scene, Size, caption, render, training_scenes
from text import embed
from train_dit import CAPTION_DROP
from transformers import AutoTokenizer, UMT5EncoderModel

ROOT = Path(__file__).resolve().parents[2]


# Of the steps: what is longer has fewer clips a step, and what is known already must not be forgotten.
SHARES = dict(zip(SIZES, (1 / 4, 1 / 4, 1 / 2), strict=True))


class Latents:
    """Normalised latents of scenes at any size: drawn and encoded when first asked for, and kept as files."""

    def __init__(self, work: Path, vae: AutoencoderKLWan, device: torch.device):
        self.work, self.vae, self.device = work / "latents", vae.to(device).eval(), device
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    @torch.no_grad()
    def get(self, kind: str, scenes: list[Scene], picks: list[int], size: Size) -> torch.Tensor:
        """(B, C, T, h, w) float32 of scenes[i] for each of `picks`; `kind` names the list of scenes."""
        folder = self.work / str(size) / kind
        folder.mkdir(parents=True, exist_ok=True)
        out = []
        for i in picks:
            path = folder / f"{i:04d}.pt"
            if not path.exists():
                clip = render([scenes[i]], num_frames=size.frames, size=size.side, device=self.device)
                save_tensors(path, {"latents": self.vae.encode(clip).latent_dist.mode().half().cpu()})
            out.append(torch.load(path, weights_only=True)["latents"].float())
        return (torch.cat(out) - self.mean) / self.std


def velocity_error(model, x0, noise, sigma, text, device) -> torch.Tensor:
    """The flow-matching loss at noise levels sigma (B,)."""
    level = sigma.view(-1, 1, 1, 1, 1)
    xt, target = ((1 - level) * x0 + level * noise).to(device), (noise - x0).to(device)
    with autocast(device):
        v = model(hidden_states=xt, timestep=sigma.to(device) * 1000, encoder_hidden_states=text, return_dict=False)[0]
    return (v.float() - target).square().mean()


@torch.no_grad()
def held_out_loss(model, embedded, latents: Latents, size: Size, shift: float, count: int) -> float:
    """The mean loss on held-out clips, each at its own fixed noise and noise level."""
    scenes, total = held_out_scenes(count, 2), 0.0
    generator = torch.Generator().manual_seed(7)
    levels = sigmas(count, shift, generator)
    for i, scene in enumerate(scenes):
        x0 = latents.get("held_out", scenes, [i], size)
        noise = torch.randn(x0.shape, generator=generator)
        text = embedded([caption(scene, random.Random(i))])
        total += velocity_error(model, x0, noise, levels[i : i + 1], text, latents.device).item() / count
    return total


def learning_rate(share: float, step: int) -> float:
    """Factor on the base rate: a short warm-up, then level, then down to nothing over the last 35 % of the time."""
    return min(1, (step + 1) / 30) * min(1.0, max(0.0, 1 - share) / 0.35)


def export(init: Path, out: Path, model: WanTransformer3DModel) -> None:
    """The folder of `init` with another transformer, float16, and without the SLA weights that fit the old one."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(init, out, ignore=shutil.ignore_patterns("sla.safetensors", "transformer"))
    own = {name: value for name, value in model.config.items() if name != "_name_or_path"}  # of this machine
    fresh = WanTransformer3DModel.from_config(own)
    fresh.load_state_dict(model.state_dict())
    fresh.half().save_pretrained(out / "transformer")
    defaults = json.loads((out / "slagen.json").read_text())
    defaults["trained_sizes"] = [{"width": s.side, "height": s.side, "num_frames": s.frames} for s in SIZES]
    (out / "slagen.json").write_text(json.dumps(defaults, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument(
        "--init", type=Path, default=ROOT / "weights" / "tiny-wan", help="folder of the pipeline to start from"
    )
    parser.add_argument("--transformer", type=Path, help="transformer to start from in place of the pipeline's")
    parser.add_argument(
        "--minutes", type=float, default=80.0, help="total time, which the learning-rate schedule spans"
    )
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument(
        "--shift", type=float, default=4.0, help="flow shift of the noise levels (default: 4, as for sampling)"
    )
    parser.add_argument("--tokens", type=int, help="tokens per step (default: 2600 on a CPU, 65536 on a GPU)")
    parser.add_argument(
        "--fresh", type=float, default=0.2, help="new clips to add for each clip that is trained on (default: 0.2)"
    )
    parser.add_argument(
        "--stars", type=float, default=1.0, help="how often a star is drawn for each other shape (default: 1)"
    )
    parser.add_argument("--save-minutes", type=float, default=5.0, help="minutes between two checkpoints")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: PyTorch's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = best_device()
    args.work.mkdir(parents=True, exist_ok=True)
    per_step = args.tokens or (2600 if device.type == "cpu" else 65536)
    torch.manual_seed(args.seed)
    latents = Latents(args.work, AutoencoderKLWan.from_pretrained(args.init / "vae", torch_dtype=torch.float32), device)
    tokenizer = AutoTokenizer.from_pretrained(args.init / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(args.init / "text_encoder", dtype=torch.float32).to(device).eval()
    load = WanTransformer3DModel.from_pretrained
    model = load(args.transformer or args.init / "transformer", torch_dtype=torch.float32).to(device).train()

    def embedded(texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return embed(tokenizer, encoder, texts, device)

    scenes = training_scenes()
    random.Random(args.seed).shuffle(scenes)
    muon, adam = make_optimizers(model, args.lr, extra=[])
    ema = Ema([model], 0.99)
    parts = dict(model=model, muon=muon, adam=adam, ema=ema)
    state_path = args.work / "sizes.state"
    state = load_state(state_path, parts)
    step, spent = state.get("step", 0), state.get("spent", 0.0)
    average, last_save = dict[str, float](), time.monotonic()

    def checkpoint(count: int) -> None:
        save_state(state_path, parts, step=step, spent=spent)
        with ema.applied():
            export(args.init, args.work / "sizes", model)
            losses = {str(s): held_out_loss(model, embedded, latents, s, args.shift, count) for s in SIZES}
        log(step, spent, **{f"held_out_{name}": loss for name, loss in losses.items()})

    while spent < args.minutes * 60:
        began = time.monotonic()
        rate = learning_rate(spent / (args.minutes * 60), step)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        rng = random.Random(args.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        size = rng.choices(SIZES, [SHARES[s] for s in SIZES])[0]
        batch = max(1, per_step // size.tokens)
        pool = min(len(scenes), 2 * batch + 8 + int(step * SHARES[size] * batch * args.fresh))
        weights = [args.stars if scene.shape == "star" else 1.0 for scene in scenes[:pool]]
        picks = rng.choices(range(pool), weights, k=batch)
        x0 = latents.get("training", scenes, picks, size)
        texts = ["" if rng.random() < CAPTION_DROP else caption(scenes[i], rng) for i in picks]
        noise = torch.randn(x0.shape, generator=generator)
        loss = velocity_error(model, x0, noise, sigmas(batch, args.shift, generator), embedded(texts), device)
        for optimizer in (muon, adam):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        ema.update(step)
        step += 1
        spent += time.monotonic() - began
        average[str(size)] = 0.95 * average.get(str(size), loss.item()) + 0.05 * loss.item()
        if step % 10 == 0:
            log(step, spent, pool=pool, lr=args.lr * rate, **average)
        if time.monotonic() - last_save > args.save_minutes * 60:
            checkpoint(4)
            last_save = time.monotonic()
    checkpoint(16)


if __name__ == "__main__":
    main()
