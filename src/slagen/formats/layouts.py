"""How each public form of a Wan2.1 transformer spells the names of its tensors: one record a form, in one table.

    diffusers   blocks.0.attn1.to_q         save_pretrained, single or sharded
    wan         blocks.0.self_attn.q        the original repository, Comfy's repacks, TurboDiffusion
    fastvideo   blocks.0.to_q               FastVideo's own names in a diffusers folder

A form is added by one more record: `register(Layout(...))`. Reading, `info`, `convert` and `merge` then know it.
Source: github.com/Wan-Video/Wan2.1, github.com/thu-ml/TurboDiffusion, github.com/hao-ai-lab/FastVideo.
"""

import functools
import re
from dataclasses import dataclass

from slagen.attention.registry import parameter_group


@dataclass(frozen=True)
class Layout:
    """One spelling of the names of a transformer's tensors, without what leads them in a file.

    Args:
        name: as `info` shows it.
        rules: regular expressions of whole names, and what each is in diffusers, as for `re.sub`.
        starts: regular expressions of how its names start, also those of adapters and quantised weights for its layers;
            what stands before such a start in a file is a prefix.
        projections: where `proj_l` of SLA can lie in a block, such as "attn1.processor".
    """

    name: str
    rules: tuple[tuple[str, str], ...]
    starts: tuple[str, ...]
    projections: tuple[str, ...] = ()

    def rename(self, name: str) -> str | None:
        """A tensor's name in diffusers; None for one that this form has not."""
        for pattern, target in _compiled(self.rules):
            if pattern.match(name):
                return pattern.sub(target, name, count=1)  # which keeps the template, as match.expand does not
        return None


@functools.cache
def _compiled(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(rf"(?:{pattern})\Z"), target) for pattern, target in rules)


LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> None:
    """Add a form to those that are read."""
    LAYOUTS[layout.name] = layout


def leading(name: str) -> str | None:
    """What leads a transformer's name in a file: a place in a pickle, and any number of prefixes. None for a name that
    starts as no form's does."""
    match = _start_pattern(tuple(LAYOUTS.values())).match(name)
    return None if match is None else match[1]


@functools.cache
def _start_pattern(layouts: tuple[Layout, ...]) -> re.Pattern[str]:
    starts = dict.fromkeys(start for layout in layouts for start in layout.starts)
    return re.compile(rf"((?:.*/)?(?:[^./]+\.)*?)(?:{'|'.join(starts)})")


def learned(name: str) -> tuple[int, str, str] | None:
    """Of a parameter that an attention method learned: its layer, place in the block, and name there, such as
    "proj_l.weight"; None for any other name.

    As published forms spell it, it is `proj_l` of SLA, or the gate of FastVideo's VSA; under slagen's own names, what
    any method registered has.
    """
    match = _own_pattern.fullmatch(name) if parameter_group(name) is not None else None
    match = match or _projection_pattern(tuple(LAYOUTS.values())).fullmatch(name) or _gate_pattern.fullmatch(name)
    return None if match is None else (int(match[1]), match[2], match[3])


@functools.cache
def _projection_pattern(layouts: tuple[Layout, ...]) -> re.Pattern[str]:
    places = dict.fromkeys(re.escape(place) for layout in layouts for place in layout.projections)
    return re.compile(rf"blocks\.(\d{{1,9}})\.({'|'.join(places)})\.(proj_l{_END})")


_END = r"\.(weight|bias)"
_WAN = (
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
    (rf"blocks\.(\d+)\.cross_attn\.([kv])_img{_END}", r"blocks.\1.attn2.add_\2_proj.\3"),
    (r"blocks\.(\d+)\.cross_attn\.norm_k_img\.weight", r"blocks.\1.attn2.norm_added_k.weight"),
    (rf"img_emb\.proj\.0{_END}", r"condition_embedder.image_embedder.norm1.\1"),
    (rf"img_emb\.proj\.1{_END}", r"condition_embedder.image_embedder.ff.net.0.proj.\1"),
    (rf"img_emb\.proj\.3{_END}", r"condition_embedder.image_embedder.ff.net.2.\1"),
    (rf"img_emb\.proj\.4{_END}", r"condition_embedder.image_embedder.norm2.\1"),
    (rf"blocks\.(\d+)\.norm3{_END}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.0{_END}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.2{_END}", r"blocks.\1.ffn.net.2.\2"),
)
_FASTVIDEO = (
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
)
_DIFFUSERS = (
    (rf"(patch_embedding|proj_out|condition_embedder\.time_proj){_END}", r"\1.\2"),
    (rf"(condition_embedder\.(?:time|text)_embedder\.linear_[12]){_END}", r"\1.\2"),
    (r"((?:blocks\.\d+\.)?scale_shift_table)", r"\1"),
    (rf"(blocks\.\d+\.attn[12]\.(?:to_[qkv]|to_out\.0)){_END}", r"\1.\2"),
    (r"(blocks\.\d+\.attn[12]\.norm_[qk]\.weight)", r"\1"),
    (rf"(blocks\.\d+\.attn2\.add_[kv]_proj){_END}", r"\1.\2"),
    (r"(blocks\.\d+\.attn2\.norm_added_k\.weight)", r"\1"),
    (rf"(condition_embedder\.image_embedder\.(?:norm[12]|ff\.net\.(?:0\.proj|2))){_END}", r"\1.\2"),
    (rf"(blocks\.\d+\.(?:norm2|ffn\.net\.0\.proj|ffn\.net\.2)){_END}", r"\1.\2"),
)
OWN_SPELLING = "attn1.processor"  # where slagen puts what is learned, so that diffusers saves it under this name
# FastVideo puts the gate beside to_q in its own names, and leaves it there in diffusers'; others move it into attn1.
_gate_pattern = re.compile(rf"blocks\.(\d{{1,9}})((?:\.attn1)?)\.(to_gate_compress{_END})")
_own_pattern = re.compile(rf"blocks\.(\d{{1,9}})\.({re.escape(OWN_SPELLING)})\.(.+)")

register(Layout(
    "diffusers", _DIFFUSERS, projections=("attn1.attn_op.local_attn", OWN_SPELLING),
    starts=(r"patch_embedding\.", r"condition_embedder\.", r"proj_out\.", r"scale_shift_table$",
            r"blocks\.\d+\.(?:attn[12]\.|ffn\.net\.|norm2\.|scale_shift_table$)"),
))  # fmt: skip
register(Layout(
    "wan", _WAN, projections=("self_attn.attn_op.local_attn",),
    starts=(r"patch_embedding\.", r"(?:time|text)_embedding\.\d", r"time_projection\.1", r"head\.(?:head|modulation)",
            r"img_emb\.proj\.", r"blocks\.\d+\.cross_attn\.[kv]_img\.",
            r"blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]\.|ffn\.[02]\.|norm3\.|modulation$)"),
))  # fmt: skip
register(Layout(
    "fastvideo", _FASTVIDEO, projections=("attn1.attn_impl",),
    starts=(r"patch_embedding\.", r"condition_embedder\.", r"proj_out\.", r"scale_shift_table$",
            r"blocks\.\d+\.(?:attn[12]\.|ffn\.fc_(?:in|out)\.|scale_shift_table$|to_(?:[qkv]|out)\.)"),
))  # fmt: skip

# The weights of a block that TurboDiffusion keeps in int8, by their names in diffusers.
LINEARS_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ffn\.net\.(0\.proj|2))\.weight")
