"""Stage 3: train text encoder and transformer with flow matching: on one latent frame, then two, then whole clips."""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from common import Ema, autocast, best_device, load_state, log, make_optimizers, save_state, sigmas
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from scenes import Scene, caption
from text import TEXT_DIM, build_text_encoder, build_tokenizer, embed
from transformers import UMT5EncoderModel

CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16,
    text_dim=TEXT_DIM, freq_dim=256, ffn_dim=768, num_layers=6, cross_attn_norm=True,
    qk_norm="rms_norm_across_heads", rope_max_seq_len=128,
)  # fmt: skip
CAPTION_DROP = 0.1
# Each phase: the share of the steps at which it ends, latent frames, batch, flow shift.
PHASES = ((0.10, 1, 96, 2.0), (0.25, 2, 48, 2.5), (1.0, 5, 24, 4.0))


def build() -> WanTransformer3DModel:
    """A fresh transformer with open gates, so that every block learns from the first step."""
    model = WanTransformer3DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:
            torch.nn.init.xavier_uniform_(parameter)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.mul_(0.1)
            block.scale_shift_table[:, (2, 5)] += 0.5
    return model


class Clips:
    """The encoded clips, normalised, with a freshly worded caption at every draw."""

    def __init__(self, work: Path, vae_config, name: str = "clips"):
        files = sorted((work / "clips").glob("*.pt")) if name == "clips" else [work / f"{name}.pt"]
        parts = [torch.load(f, weights_only=True) for f in files]
        mean = torch.tensor(vae_config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae_config.latents_std).view(1, -1, 1, 1, 1)
        self.latents = torch.cat([(p["latents"].float() - mean) / std for p in parts]).to(torch.bfloat16)
        self.scenes = [Scene(**s) for p in parts for s in p["scenes"]]

    def batch(self, size: int, frames: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
        picks = rng.sample(range(len(self.scenes)), size)
        texts = ["" if rng.random() < CAPTION_DROP else caption(self.scenes[i], rng) for i in picks]
        return self.latents[picks][:, :, :frames].float(), texts


def held_out_loss(model, encoder, tokenizer, clips: Clips, device, frames: int, shift: float) -> float:
    """Flow-matching loss on 32 held-out clips at fixed noise."""
    generator = torch.Generator().manual_seed(7)
    x0 = clips.latents[:32, :, :frames].float()
    noise = torch.randn(x0.shape, generator=generator)
    sigma = sigmas(32, shift, generator).view(-1, 1, 1, 1, 1)
    texts = [caption(s, random.Random(i)) for i, s in enumerate(clips.scenes[:32])]
    total = 0.0
    with torch.no_grad(), autocast(device):
        for i in range(0, 32, 8):
            part = slice(i, i + 8)
            xt = ((1 - sigma) * x0 + sigma * noise)[part].to(device)
            text = embed(tokenizer, encoder, texts[part], device)
            v = model(hidden_states=xt, timestep=sigma[part].view(-1).to(device) * 1000, encoder_hidden_states=text,
                      return_dict=False)[0]  # fmt: skip
            total += (v.float().cpu() - (noise - x0)[part]).square().mean().item() / 4
    return total


def export(work: Path, model, encoder, tokenizer, out: Path) -> None:
    """Write the diffusers folder of the dense pipeline, float16 weights."""
    vae = AutoencoderKLWan.from_pretrained(work / "vae")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=4.0
    )
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder.half(), vae=vae.half(), scheduler=scheduler, transformer=model.half()
    )
    pipe.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline whose shapes fit")
    parser.add_argument("--whole", action="store_true", help="train on whole clips from the first step")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device = best_device()
    torch.manual_seed(args.seed)
    vae_config = AutoencoderKLWan.from_pretrained(args.work / "vae").config
    clips, held = Clips(args.work, vae_config), Clips(args.work, vae_config, "held_out")
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer)).to(device).train()
    model = build().to(device).train()
    if args.init is not None:
        fits = WanTransformer3DModel.from_pretrained(args.init / "transformer").state_dict()
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in fits.items() if v.shape == own[k].shape}, strict=False)
        encoder.load_state_dict(UMT5EncoderModel.from_pretrained(args.init / "text_encoder").state_dict())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    muon, adam = make_optimizers(model, args.lr, extra=list(encoder.parameters()))
    ema = Ema([model, encoder], 0.997)
    parts = dict(model=model, encoder=encoder, muon=muon, adam=adam, ema=ema)
    state = load_state(args.work / "dit.state", parts)
    step, spent = state.get("step", 0), state.get("spent", 0.0)
    if not args.no_compile:
        model.compile_repeated_blocks(dynamic=False)
    average, last_save = 0.0, time.monotonic()
    while step < args.steps:
        began = time.monotonic()
        share = step / args.steps
        _, frames, size, shift = PHASES[-1] if args.whole else next(p for p in PHASES if share < p[0])
        rate = min(1, (step + 1) / 100) * (1.0 if share < 0.4 else max(0.01, (1 - share) / 0.6))
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        rng = random.Random(args.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x0, texts = clips.batch(size, frames, rng)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigmas(size, shift, generator).view(-1, 1, 1, 1, 1)
        xt, target = ((1 - sigma) * x0 + sigma * noise).to(device), (noise - x0).to(device)
        with autocast(device):
            text = embed(tokenizer, encoder, texts, device)
            v = model(hidden_states=xt, timestep=sigma.view(-1).to(device) * 1000, encoder_hidden_states=text,
                      return_dict=False)[0]  # fmt: skip
        loss = (v.float() - target).square().mean()
        for optimizer in (muon, adam):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *encoder.parameters()], 1.0)
        muon.step()
        adam.step()
        ema.update(step)
        step += 1
        average = loss.item() if not average or math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        spent += time.monotonic() - began
        if step % 50 == 0:
            log(step, spent, frames=frames, loss=average, per_step=time.monotonic() - began)
        if time.monotonic() - last_save > 120:
            save_state(args.work / "dit.state", parts, step=step, spent=spent)
            with ema.applied():
                value = held_out_loss(model, encoder, tokenizer, held, device, frames, shift)
            log(step, spent, frames=frames, held_out=value)
            last_save = time.monotonic()
    save_state(args.work / "dit.state", parts, step=step, spent=spent)
    with ema.applied():
        fresh = build()
        fresh.load_state_dict(model.state_dict())
        export(args.work, fresh.eval(), encoder.eval(), tokenizer, args.work / "pipeline")


if __name__ == "__main__":
    main()
