"""The names of a Wan2.1 transformer's tensors in every public form, and what they are in diffusers.

    diffusers   blocks.0.attn1.to_q         save_pretrained, single or sharded
    wan         blocks.0.self_attn.q        the original repository, Comfy's repacks, TurboDiffusion
    fastvideo   blocks.0.to_q               FastVideo's own names in a diffusers folder

Source: github.com/Wan-Video/Wan2.1, github.com/thu-ml/TurboDiffusion, github.com/hao-ai-lab/FastVideo.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable

# An all-in-one file's parts beside the transformer, and what training code leaves inside names.
_OTHER_PARTS = re.compile(
    r"(text_encoders?|text_model|cond_stage_model|conditioner|clip_vision|clip|image_encoder|vae|first_stage_model)\."
)
_WRAPPER = re.compile(r"(?<![^./])(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
_ROOT = re.compile(  # what leads a transformer's names: a place in a pickle, and any number of prefixes
    r"((?:.*/)?(?:[^./]+\.)*?)(?:patch_embedding\.|(?:time|text)_embedding\.\d|time_projection\.1|condition_embedder\.|"
    r"head\.(?:head|modulation)|proj_out\.|scale_shift_table$|blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]\.|attn[12]\.|"
    r"ffn\.(?:[02]|net|fc_(?:in|out))\.|norm[23]\.|modulation$|scale_shift_table$|to_(?:[qkv]|out)\.))"
)

_END = r"\.(weight|bias)"
_WAN = [
    (rf"patch_embedding{_END}", r"patch_embedding.\1"),
    (rf"time_embedding\.0{_END}", r"condition_embedder.time_embedder.linear_1.\1"),
    (rf"time_embedding\.2{_END}", r"condition_embedder.time_embedder.linear_2.\1"),
    (rf"text_embedding\.0{_END}", r"condition_embedder.text_embedder.linear_1.\1"),
    (rf"text_embedding\.2{_END}", r"condition_embedder.text_embedder.linear_2.\1"),
    (rf"time_projection\.1{_END}", r"condition_embedder.time_proj.\1"),
    (rf"head\.head{_END}", r"proj_out.\1"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    (rf"blocks\.(\d+)\.self_attn\.([qkv]){_END}", r"blocks.\1.attn1.to_\2.\3"),
    (rf"blocks\.(\d+)\.self_attn\.o{_END}", r"blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.self_attn\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    (rf"blocks\.(\d+)\.cross_attn\.([qkv]){_END}", r"blocks.\1.attn2.to_\2.\3"),
    (rf"blocks\.(\d+)\.cross_attn\.o{_END}", r"blocks.\1.attn2.to_out.0.\2"),
    (r"blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    (rf"blocks\.(\d+)\.norm3{_END}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.0{_END}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.2{_END}", r"blocks.\1.ffn.net.2.\2"),
]
_FASTVIDEO = [
    (rf"patch_embedding\.proj{_END}", r"patch_embedding.\1"),
    (rf"condition_embedder\.text_embedder\.fc_in{_END}", r"condition_embedder.text_embedder.linear_1.\1"),
    (rf"condition_embedder\.text_embedder\.fc_out{_END}", r"condition_embedder.text_embedder.linear_2.\1"),
    (rf"condition_embedder\.time_embedder\.mlp\.fc_in{_END}", r"condition_embedder.time_embedder.linear_1.\1"),
    (rf"condition_embedder\.time_embedder\.mlp\.fc_out{_END}", r"condition_embedder.time_embedder.linear_2.\1"),
    (rf"condition_embedder\.time_modulation\.linear{_END}", r"condition_embedder.time_proj.\1"),
    (rf"proj_out{_END}", r"proj_out.\1"),
    (r"(blocks\.\d+\.)?scale_shift_table", r"\1scale_shift_table"),
    (rf"blocks\.(\d+)\.to_([qkv]){_END}", r"blocks.\1.attn1.to_\2.\3"),
    (rf"blocks\.(\d+)\.to_out{_END}", r"blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    (rf"blocks\.(\d+)\.attn2\.to_([qkv]){_END}", r"blocks.\1.attn2.to_\2.\3"),
    (rf"blocks\.(\d+)\.attn2\.to_out{_END}", r"blocks.\1.attn2.to_out.0.\2"),
    (r"blocks\.(\d+)\.attn2\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    (rf"blocks\.(\d+)\.self_attn_residual_norm\.norm{_END}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.fc_in{_END}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.fc_out{_END}", r"blocks.\1.ffn.net.2.\2"),
]
_DIFFUSERS = [
    (rf"(patch_embedding|proj_out|condition_embedder\.time_proj){_END}", r"\1.\2"),
    (rf"(condition_embedder\.(?:time|text)_embedder\.linear_[12]){_END}", r"\1.\2"),
    (r"((?:blocks\.\d+\.)?scale_shift_table)", r"\1"),
    (rf"(blocks\.\d+\.attn[12]\.(?:to_[qkv]|to_out\.0)){_END}", r"\1.\2"),
    (r"(blocks\.\d+\.attn[12]\.norm_[qk]\.weight)", r"\1"),
    (rf"(blocks\.\d+\.(?:norm2|ffn\.net\.0\.proj|ffn\.net\.2)){_END}", r"\1.\2"),
]
OWN_SPELLING = "attn1.processor"  # where slagen puts `proj_l`, so that diffusers saves it under this name
PROJECTION = re.compile(
    r"blocks\.(\d+)\.(self_attn\.attn_op\.local_attn|attn1\.attn_op\.local_attn|attn1\.attn_impl|attn1\.processor)"
    rf"\.proj_l{_END}"
)


def is_untuned(names: Collection[str]) -> bool:
    """Whether tensors' names are surely those of a Wan transformer alone, without SLA weights and in no 8-bit form."""
    found = list(transformers(names).values())
    plain = inside(names, found[0], found).values() if len(found) == 1 else ()
    return bool(plain) and any(all(map(rename, plain)) for rename in LAYOUTS.values())


def _renamer(table: list[tuple[str, str]]) -> Callable[[str], str | None]:
    rules = [(re.compile(rf"(?:{pattern})\Z"), target) for pattern, target in table]

    def rename(name: str) -> str | None:
        for pattern, target in rules:
            if pattern.match(name):
                return pattern.sub(target, name, count=1)  # which keeps the template, as match.expand does not
        return None

    return rename


LAYOUTS = {"diffusers": _renamer(_DIFFUSERS), "wan": _renamer(_WAN), "fastvideo": _renamer(_FASTVIDEO)}
LINEARS_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ffn\.net\.(0\.proj|2))\.weight")


def transformers(names: Iterable[str]) -> dict[str, str]:
    """What leads the names of each transformer in a file, by a short name for it.

    There is one, as a rule, and two where a training run's average lies beside it: {"generator": "generator/model.",
    "generator_ema": "generator_ema/model."}. None is in a file of anything else.
    """
    counts = Counter(match[1] for name in names if (match := _ROOT.match(_WRAPPER.sub("", name))))
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if 2 * count > most]
    short = {re.split("[./]", prefix)[0] or "top": prefix for prefix in prefixes}
    return short if len(short) == len(prefixes) else {prefix.strip("./") or "top": prefix for prefix in prefixes}


def inside(names: Iterable[str], prefix: str, others: Collection[str] = ()) -> dict[str, str]:
    """{a name in the file: the same without prefix and wrappers} for all that is the transformer's under a prefix.

    Left out are the other parts of an all-in-one file, what lies in other dictionaries of a pickle, and, beside other
    transformers, all else. What is not under the prefix otherwise keeps its name, so that it is told as a fault.

    Args:
        others: what leads the names of every transformer in the file.
    """
    place = prefix[: prefix.rfind("/") + 1]
    longer = tuple(other for other in others if len(other) > len(prefix))
    found = {}
    for name in names:
        plain = _WRAPPER.sub("", name)
        if plain.startswith(prefix) and not (longer and plain.startswith(longer)):
            plain = plain.removeprefix(prefix)
        elif len(others) > 1 or not plain.startswith(place):
            continue
        if not _OTHER_PARTS.match(plain):
            found[name] = plain
    return found


def other_parts(names: Iterable[str]) -> list[str]:
    """The parts of an all-in-one file beside the transformer, such as "vae"."""
    return sorted({match[1] for name in names if (match := _OTHER_PARTS.match(name))})
