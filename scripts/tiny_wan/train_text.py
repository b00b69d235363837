"""Stage 3b: teach the text encoder that "from right to left" means "to the left".

The transformer soon learns what single words mean, but only much later what their order means. Here only the text
encoder is trained: to give a phrase with two directions the embeddings of its short synonym, and all other texts the
embeddings that they had. The transformer, which does not see the order of words, needs no change then.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import torch
from common import best_device, log
from scenes import caption, sample_scene
from text import MAX_SEQUENCE_LENGTH
from transformers import AutoTokenizer, UMT5EncoderModel

PLAIN = {  # a phrase whose order matters, and what replaces its four words
    "from left to right": "to the right", "from right to left": "to the left",
    "from bottom to top": "upwards", "from top to bottom": "downwards",
}  # fmt: skip
TAKES = {  # for each of the four words, which word of the synonym it is to sound like
    "to the right": (0, 2, 1, 2), "to the left": (0, 2, 1, 2), "upwards": (0, 0, 0, 0), "downwards": (0, 0, 0, 0),
}  # fmt: skip


def pair(text: str) -> tuple[str, list[int]]:
    """The plain synonym of a caption, and for each word of the caption the word of the synonym it corresponds to."""
    for phrase, plain in PLAIN.items():
        if phrase in text:
            before = text[: text.index(phrase)].split()
            after = text[text.index(phrase) + len(phrase) :].split()
            at, length = len(before), len(plain.split())
            places = [*range(at), *(at + i for i in TAKES[plain]), *range(at + length, at + length + len(after) + 1)]
            return text.replace(phrase, plain), places
    return text, list(range(len(text.split()) + 1))  # and the end of the sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = best_device()
    torch.manual_seed(args.seed)
    folder = args.work / "pipeline" / "text_encoder"
    tokenizer = AutoTokenizer.from_pretrained(args.work / "pipeline" / "tokenizer")
    student = UMT5EncoderModel.from_pretrained(folder).float().to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    # Order is known by the relative position bias alone, which starts near 0 and has far to go.
    bias = [p for name, p in student.named_parameters() if "relative_attention_bias" in name]
    rest = [p for name, p in student.named_parameters() if "relative_attention_bias" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": bias, "lr": 50 * args.lr}, {"params": rest, "lr": args.lr}], weight_decay=0.0
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    began = time.monotonic()

    def states(model: UMT5EncoderModel, texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt").to(device)
        return model(batch.input_ids, batch.attention_mask).last_hidden_state

    for step in range(args.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 50) * max(0.02, 1 - step / args.steps)
        rng = random.Random(args.seed * 1_000_003 + step)
        drawn = [caption(sample_scene(rng), rng) for _ in range(128)]
        ordered = [text for text in drawn if " from " in text][:24]
        texts = ordered + [text for text in drawn if " from " not in text][: 48 - len(ordered)]
        pairs = [pair(text) for text in texts]
        with torch.no_grad():
            target = states(teacher, [plain for plain, _ in pairs])
        found = states(student, texts)
        error = torch.stack(
            [
                (found[i, : len(places)] - target[i, places]).square().mean() / target[i, places].square().mean()
                for i, (_, places) in enumerate(pairs)
            ]
        )
        loss = error.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(step + 1, time.monotonic() - began, loss=loss.item(), worst=error.max().item())
    student.eval().half().cpu().save_pretrained(folder)


if __name__ == "__main__":
    main()
