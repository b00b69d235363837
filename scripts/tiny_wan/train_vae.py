"""Stage 1: train the causal video VAE (AutoencoderKLWan, 8x in space, 4x in time) on rendered clips."""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import autocast, best_device, load_state, log, save_state
from diffusers import AutoencoderKLWan
from scenes import SIZE, Scene, render, sample_scene

CONFIG = dict(
    base_dim=16, decoder_base_dim=24, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
    temperal_downsample=[True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
    scale_factor_spatial=8, scale_factor_temporal=4,
    latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
)  # fmt: skip


NOISE = 0.15  # on latents in training, in units of their spread


def windows(scenes, side: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """A square part of the frame for each scene, near where the object passes and on the grid of the latents."""
    out = []
    for scene in scenes:
        t = rng.random()
        centre = [(a * (1 - t) + b * t) * SIZE for a, b in zip(scene.start[:2], scene.end[:2], strict=True)]
        left, top = (8 * round(min(max(c + rng.uniform(-8, 8) - side / 2, 0), SIZE - side) / 8) for c in centre)
        out.append((left, top, side))
    return out


def importance(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each pixel of clips (B, 3, F, H, W) counts, and each clip's contrast.

    Edges count more than areas, and in an edge's surroundings object and background count the same in sum: the tips of
    a star and its inner corners are few pixels, and all that makes it one.
    """
    batch, _, frames, height, width = clips.shape
    background = clips[:, :, :1, :1, :1]
    distance = (clips - background).abs().amax(1, keepdim=True)
    contrast = distance.amax((1, 2, 3, 4), keepdim=True).clamp(min=0.05)
    cover = (distance / contrast).view(batch * frames, 1, height, width)
    share = F.avg_pool2d(cover, 9, 1, 4, count_include_pad=False)
    near = ((share > 0.01) & (share < 0.99)).float()
    weight = (1 + 3 * near) * (cover / (share + 0.1) + (1 - cover) / (1.1 - share))
    return weight.view(batch, 1, frames, height, width), contrast.clamp(min=0.5)  # purple on gray is low


class Encoded:
    """What encode.py left: the training scenes with their latents, for a decoder that is trained alone."""

    def __init__(self, work: Path):
        parts = [torch.load(path, weights_only=True) for path in sorted((work / "clips").glob("*.pt"))]
        self.latents = torch.cat([part["latents"] for part in parts])
        self.scenes = [Scene(**scene) for part in parts for scene in part["scenes"]]

    def batch(self, size: int, side: int, rng: random.Random, device):
        """`size` windows: latents (B, C, T, side / 8, side / 8), clips, and which pixels do not depend on the cut."""
        picks = rng.sample(range(len(self.scenes)), size)
        scenes = [self.scenes[i] for i in picks]
        places = windows(scenes, side, rng)
        cuts = [self.latents[i, :, :, y // 8 : (y + side) // 8, x // 8 : (x + side) // 8]
                for i, (x, y, _) in zip(picks, places, strict=True)]  # fmt: skip
        sound = torch.zeros(size, 1, 1, side, side, device=device)
        for i, (x, y, _) in enumerate(places):
            top, left = 8 * (y > 0), 8 * (x > 0)
            bottom, right = side - 8 * (y + side < SIZE), side - 8 * (x + side < SIZE)
            sound[i, :, :, top:bottom, left:right] = 1
        return torch.stack(cuts).float().to(device), render(scenes, window=places, device=device), sound


def build() -> AutoencoderKLWan:
    """A fresh VAE: convolutions at 1.7 times PyTorch's gain, and a posterior too narrow to drown the start in noise."""
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.weight.mul_(1.7)
        vae.quant_conv.bias[CONFIG["z_dim"] :] = -4.0
    return vae


class ConvMuon:
    """torch.optim.Muon over convolution kernels, seen as (out, in * taps) matrices."""

    def __init__(self, kernels: list[torch.nn.Parameter], lr: float):
        self.kernels = kernels
        self.matrices = [torch.nn.Parameter(k.data.view(k.shape[0], -1)) for k in kernels]
        self.muon = torch.optim.Muon(
            self.matrices, lr=lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.param_groups, self.state_dict = self.muon.param_groups, self.muon.state_dict
        self.load_state_dict = self.muon.load_state_dict

    def step(self) -> None:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.reshape(matrix.shape)
        self.muon.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument(
        "--minutes", type=float, default=13.0, help="training time, which the learning-rate schedule spans"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--refine", type=Path, help="train only the decoder of the VAE in this folder; latents stay valid"
    )
    parser.add_argument(
        "--init", type=Path, help="start from the VAE in this folder, with whole clips from the first step"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = best_device()
    torch.manual_seed(args.seed)
    vae = build().to(device).train()
    if args.init is not None or args.refine is not None:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(args.init or args.refine).state_dict())
    if args.refine is not None:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    small = [p for p in parameters if p.ndim < 4]
    muon = ConvMuon([p for p in parameters if p.ndim >= 4], args.lr)
    adam = torch.optim.AdamW(small, lr=args.lr * 1.7, betas=(0.9, 0.99), weight_decay=0.0)
    bases = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    parts = dict(vae=vae, muon=muon, adam=adam)
    state_path = args.work / ("vae.state" if args.refine is None else "vae-refine.state")
    state = load_state(state_path, parts)
    step, spent = state.get("step", 0), state.get("spent", 0.0)
    # (share of the time up to here, frames, side in pixels, batch)
    phases = [(0.20, 1, 64, 12), (0.60, 9, 64, 12), (1.01, 17, 64, 12)]
    if args.init is not None or args.refine is not None:
        phases = phases[-1:]
    encoded = Encoded(args.work) if args.refine is not None else None
    average, last_save = {}, time.monotonic()
    while spent < args.minutes * 60:
        began = time.monotonic()
        share = spent / (args.minutes * 60)
        _, frames, side, batch = next(p for p in phases if share < p[0])
        rng = random.Random(args.seed * 1_000_003 + step)
        if encoded is not None:
            z, clips, sound = encoded.batch(batch, side, rng, device)
        else:
            scenes = [sample_scene(rng) for _ in range(batch)]
            clips = render(scenes, window=windows(scenes, side, rng), device=device)
            first = rng.randrange(clips.shape[2] - frames + 1)  # a run of frames, at the true speed
            clips, sound = clips[:, :, first : first + frames], 1.0
        for group, base in bases:
            group["lr"] = base * min(1, (step + 1) / 20) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(share, 1)))
        with autocast(device):
            if encoded is None:
                posterior = vae.encode(clips).latent_dist
                z = posterior.sample()
            # A generated latent is a little off, and should still become a clean object.
            z = z + NOISE * z.detach().std((0, 2, 3, 4), keepdim=True) * torch.randn_like(z)
            decoded = vae._decode(z).sample
        error = (decoded.float() - clips).abs()
        weight, contrast = importance(clips)
        loss = ((error + error**2) * weight * sound / contrast).mean()
        values = {}
        if encoded is None:
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            loss = loss + 1e-4 * kl
            values = dict(kl=kl.item(), std=mean.std().item())
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small, 1.0)
        muon.step()
        adam.step()
        with torch.no_grad():
            values["psnr"] = -10 * math.log10(max((error**2 * sound).mean().item() / 4, 1e-10))
        for name, value in dict(l1=error.mean().item(), **values).items():
            average[name] = 0.95 * average.get(name, value) + 0.05 * value
        step += 1
        spent += time.monotonic() - began
        if step % 25 == 0:
            log(step, spent, frames=frames, **average)
        if time.monotonic() - last_save > 60:
            save_state(state_path, parts, step=step, spent=spent)
            last_save = time.monotonic()
    save_state(state_path, parts, step=step, spent=spent)
    if args.refine is not None:  # the statistics of the latents stay too
        config = AutoencoderKLWan.load_config(args.refine)
        vae.register_to_config(latents_mean=config["latents_mean"], latents_std=config["latents_std"])
    vae.eval().float().cpu().save_pretrained(args.work / "vae")


if __name__ == "__main__":
    main()
