"""Stage 4: fine-tune the dense model with SLA inside, or one of the control rows of weights/README.md.

The target is the mean of the data's velocity and the frozen dense model's, for every row alike.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from common import Ema, autocast, best_device, load_state, log, make_optimizers, save_state, sigmas
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from text import embed
from train_dit import Clips
from transformers import AutoTokenizer, UMT5EncoderModel

from slagen.config import SLAConfig
from slagen.wan.checkpoints import SLAMetadata, apply_sla, save_sla, weights_hash

ROWS = ("sla", "sparse", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--row", choices=ROWS, default="sla")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--proj-boost", type=float, default=8.0, help="factor on the learning rate of proj_l")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--linear-domain", default="all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = best_device()
    torch.manual_seed(args.seed)
    folder = args.work / "pipeline"
    teacher = WanTransformer3DModel.from_pretrained(folder / "transformer").to(device).eval().requires_grad_(False)
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").to(device).train()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base_hash = weights_hash(model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").to(device).eval().requires_grad_(False)
    clips = Clips(args.work, AutoencoderKLWan.from_pretrained(folder / "vae").config)
    shift = UniPCMultistepScheduler.from_pretrained(folder / "scheduler").config.flow_shift
    config = SLAConfig(sparsity=args.sparsity, linear_domain=args.linear_domain, block_m=args.block, block_n=args.block)
    if args.row != "dense":
        apply_sla(model, config, branches="sparse" if args.row == "sparse" else "both")
    muon, adam = make_optimizers(model, args.lr, boost={"proj_l": args.proj_boost})
    ema = Ema([model], 0.99)
    parts = dict(model=model, muon=muon, adam=adam, ema=ema)
    state_path = args.work / f"{args.row}.state"
    state = load_state(state_path, parts)
    spent, average, last_save = state.get("spent", 0.0), 0.0, time.monotonic()
    for step in range(state.get("step", 0), args.steps):
        began = time.monotonic()
        rate = min(1, (step + 1) / 30) * max(0.02, min(1.0, 2 * (1 - step / args.steps)))
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        rng = random.Random(args.seed * 1_000_003 + step + 77_000_000)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 77_000_000)
        x0, texts = clips.batch(args.batch, 5, rng)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigmas(args.batch, shift, generator).view(-1, 1, 1, 1, 1)
        call = dict(hidden_states=((1 - sigma) * x0 + sigma * noise).to(device), return_dict=False,
                    timestep=sigma.view(-1).to(device) * 1000)  # fmt: skip
        with autocast(device):
            with torch.no_grad():
                call["encoder_hidden_states"] = embed(tokenizer, encoder, texts, device)
                dense = teacher(**call)[0].float()
            v = model(**call)[0].float()
        target = ((noise - x0).to(device) + dense) / 2
        loss = (v - target).square().mean()
        for optimizer in (muon, adam):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        ema.update(step)
        spent += time.monotonic() - began
        error = ((v.detach() - dense).square().sum() / dense.square().sum()).sqrt().item()
        average = error if not average else 0.95 * average + 0.05 * error
        if (step + 1) % 20 == 0:
            log(step + 1, spent, loss=loss.item(), error_to_dense=average)
        if time.monotonic() - last_save > 120:
            save_state(state_path, parts, step=step + 1, spent=spent)
            last_save = time.monotonic()
    save_state(state_path, parts, step=args.steps, spent=spent)
    with ema.applied(), torch.no_grad():
        out = args.work / args.row
        for name, parameter in model.named_parameters():
            if "proj_l" not in name:
                parameter.data = parameter.data.half()
        if args.row == "dense":
            model.save_pretrained(out)
            return
        if args.row == "sparse":  # never trained, and never used: mark the file as such, so that loading needs a word
            for name, parameter in model.named_parameters():
                if "proj_l" in name:
                    parameter.zero_()
        metadata = SLAMetadata(config, "tiny-wan", base_hash, "all", args.steps)
        print(save_sla(model, out, metadata, base))


if __name__ == "__main__":
    main()
