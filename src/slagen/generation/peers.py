"""What other tools call our options and their values, and one line on why an option of theirs is not here.

The tools: Wan2.1's generate.py, TurboDiffusion, FastVideo, musubi-tuner, LightX2V, diffusers; their trainers too.
A command line is translated before it is parsed; names work in a prompt file too. None of it is in the help.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from slagen.errors import UsageError
from slagen.io.text import cut, quote

# Their names for our options. Underscores count as dashes.
NAMES = {
    "num-inference-steps": "steps", "sample-steps": "steps", "infer-steps": "steps", "num-steps": "steps",
    "sample-guide-scale": "guidance-scale", "guidance": "guidance-scale", "cfg": "guidance-scale",
    "cfg-scale": "guidance-scale", "precision": "dtype",
    "sample-shift": "flow-shift", "shift": "flow-shift",
    "frame-num": "num-frames", "video-length": "num-frames", "frames": "num-frames",
    "base-seed": "seed", "negative": "negative-prompt",
    "num-videos-per-prompt": "num-videos", "num-samples": "num-videos",
    "topk": "sla-topk",
    "attention-backend": "attention", "attention-type": "attention", "attn-mode": "attention",
    "attn-type": "attention",
    "model-path": "model", "ckpt-dir": "model", "task": "model",
    "dit-path": "weights", "dit": "weights", "sla-weights": "weights",
    "lora-weight": "lora", "lora-path": "lora", "lora-multiplier": "lora-scale",
    "sample-solver": "sampler", "scheduler": "sampler", "vae-path": "vae",
    "save-file": "output", "save-path": "output", "output-path": "output", "save-result-path": "output",
    "from-file": "prompts", "prompt-txt": "prompts",
    "enable-torch-compile": "compile", "image-path": "image",
    "use-cfg-parallel": "cfg-parallel", "enable-cfg-parallel": "cfg-parallel",
}  # fmt: skip
# Those of their trainers, for fine-tuning.
TRAINER_NAMES = {
    "learning-rate": "lr", "max-train-steps": "steps", "train-steps": "steps", "mixed-precision": "dtype",
    "lr-warmup-steps": "warmup-steps", "gradient-checkpointing": "checkpointing", "optimizer-type": "optimizer",
    "output-dir": "output", "save-every-n-steps": "save-every", "validation-steps": "validate-every",
    "pretrained-model-name-or-path": "model",
}  # fmt: skip
# musubi's and kohya's letters, which a line of a prompt file takes too.
LETTERS = {
    "w": "width", "h": "height", "f": "num-frames", "d": "seed", "s": "steps", "g": "guidance-scale",
    "l": "guidance-scale", "fs": "flow-shift", "n": "negative-prompt", "i": "image",
}  # fmt: skip
HEIGHT_FIRST = ("video-size", "target-shape")  # musubi's and LightX2V's, with two values: height and width

_ATTENTION = {"sagesla": "sla", "original": "dense", "sla_attn": "sla", "sage_sla_attn": "sla"}
_DENSE = dict.fromkeys(
    ("torch", "sdpa", "flash", "flash2", "flash3", "xformers", "sageattn", "torch_sdpa", "flash_attn", "sage_attn"),
    "dense",
)
_SAMPLERS = {
    "unipcmultistepscheduler": "unipc", "flowunipcmultistepscheduler": "unipc", "flow_unipc": "unipc",
    "flowmatcheulerdiscretescheduler": "euler", "flowmatchdiscretescheduler": "euler", "vanilla": "euler",
    "dpmsolvermultistepscheduler": "dpm++", "flowdpmsolvermultistepscheduler": "dpm++", "dpmpp": "dpm++",
}  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
# Wan's --task, and TurboDiffusion's names of models.
TASKS = {"t2v-1.3b": "wan2.1-t2v-1.3b", "t2v-14b": "wan2.1-t2v-14b", "i2v-14b": "wan2.1-i2v-14b-480p"}
MODELS = {"Wan2.1-1.3B": "wan2.1-t2v-1.3b", "Wan2.1-14B": "wan2.1-t2v-14b"}
# Their values, in small letters, by the spelling of the option that they are given with.
VALUES = {
    "attention": _ATTENTION, "attention-type": _ATTENTION, "attention-backend": _ATTENTION | _DENSE,
    "attn-mode": _ATTENTION | _DENSE, "sampler": _SAMPLERS, "sample-solver": _SAMPLERS, "scheduler": _SAMPLERS,
    "attn-type": _ATTENTION, "dtype": _DTYPES, "precision": _DTYPES, "mixed-precision": _DTYPES | {"no": "fp32"},
    "optimizer-type": {},
}  # fmt: skip

_LAST = "only the image that a video begins with can be given, with --image; FLF2V, with a last image, is not supported"
_CLIP = "the image encoder is loaded from the model's folder, given with --model"
_CROP = "with --image and no --size, a video has the aspect ratio of its image"
_VIDEO = "video-to-video and control videos are not supported yet"
_LORA = "give every LoRA file with its scale: --lora FILE:SCALE"
_MEMORY = (
    "slagen offloads parts of the model automatically when they do not all fit on the GPU; --offload model, group or "
    "sequential says how"
)
_GPUS = (
    "to generate one video on N GPUs (Ulysses), start torchrun --nproc-per-node N -m slagen generate; slagen batch "
    "--ray distributes videos over GPUs"
)
_RING = f"ring attention sees only some of the keys at a time, but key blocks are chosen among all of them; {_GPUS}"
_WHOLE = "under torchrun, processes share the work of a video, and each of them holds the whole model"
_HALVES = "under torchrun, --cfg-parallel runs the two passes of guidance in two halves of the processes"
_FP8 = "slagen computes in bf16, fp16 or fp32 (--dtype); fp8 and int8 weight files can be given with --weights"
_REWRITE = "slagen does not rewrite prompts; give the full prompt"
_TEXT = "the text encoder is loaded from the model's folder, given with --model"
_LAYER = "skip-layer guidance is not supported"
_CACHE = "TeaCache is not in diffusers; --cache first-block skips blocks in a similar way"
_CFG = "the guidance scale is the same in every step; set it with --guidance-scale"
_TWO = f"Wan2.2 with its two transformers is not supported, and {_CFG}"
_DENSE_IS = "--attention dense is full attention, and uses PyTorch's scaled_dot_product_attention"
_TILES = "the VAE decodes one latent frame at a time, and in tiles of 256x256 pixels with --vae-tiling on"
_ONLY = "slagen generates videos from text, and from an image with --image"
# Their options that slagen has not, and why, in one line.
REFUSED = {
    **dict.fromkeys(
        ("images", "first-frame", "last-frame", "last-frame-path", "end-image-path", "one-frame-inference",
         "control-image-path", "ei"), _LAST),
    "clip": _CLIP, "adaptive-resolution": _CROP,
    **dict.fromkeys(
        ("video", "video-path", "src-video", "src-mask", "src-ref-images", "control-path", "cn", "pose",
         "audio-path"), _VIDEO),
    **dict.fromkeys(
        ("lora-weights", "lora-nickname", "lora-configs", "lora-weight-high-noise", "lora-multiplier-high-noise",
         "include-patterns", "exclude-patterns", "lycoris", "save-merged-model"), _LORA),
    **dict.fromkeys(
        ("offload-model", "blocks-to-swap", "cpu-offload", "dit-cpu-offload", "dit-layerwise-offload",
         "text-encoder-cpu-offload", "vae-cpu-offload", "image-encoder-cpu-offload", "pin-cpu-memory", "t5-cpu",
         "vae-cache-cpu", "offload-inactive-dit", "lazy-loading", "enable-model-cpu-offload",
         "enable-sequential-cpu-offload", "enable-group-offload"), _MEMORY),
    **dict.fromkeys(
        ("ulysses-size", "ulysses-degree", "nproc", "nproc-per-node", "num-gpus", "sp-size", "sp-degree",
         "seq-p-size", "distributed-executor-backend", "master-port"), _GPUS),
    **dict.fromkeys(("ring-size", "ring-degree"), _RING),
    **dict.fromkeys(
        ("t5-fsdp", "dit-fsdp", "tp-size", "tensor-p-size", "hsdp-shard-dim", "hsdp-replicate-dim",
         "use-fsdp-inference"), _WHOLE),
    **dict.fromkeys(("cfg-p-size", "cfg-size", "cfg-degree", "cfg-parallel-size", "cfg-parallel-degree"), _HALVES),
    **dict.fromkeys(
        ("fp8", "fp8-scaled", "fp8-fast", "fp8-t5", "fp8-base", "quantization", "quantize", "quant",
         "convert-model-dtype", "dit-precision", "vae-precision", "text-encoder-precision",
         "text-encoder-precisions"), _FP8),
    "xformers": f"xFormers is not used; {_DENSE_IS}",
    **dict.fromkeys(("sdpa", "torch-sdpa"), _DENSE_IS),
    **dict.fromkeys(
        ("flash-attn", "flash-attn2", "flash-attn3", "flash", "flash2", "flash3"),
        "to use FlashAttention, give --attention dense --backend flash-attn"),
    **dict.fromkeys(("sage-attn", "sageattn"), "to use SageAttention, give --attention dense --backend sage"),
    **dict.fromkeys(
        ("enable-vae-tiling", "vae-slicing", "enable-vae-slicing", "vae-chunk-size",
         "vae-spatial-tile-sample-min-size", "vae-sp"), _TILES),
    **dict.fromkeys(
        ("embedded-cfg-scale", "embedded-guidance-scale"), f"Wan's models have no embedded guidance; {_CFG}"),
    **dict.fromkeys(("enable-cfg", "use-cfg"), "guidance is used if --guidance-scale is above 1"),
    "quant-linear": "quantised files, such as those ending in -quant.pth, are recognised, and stay quantised in memory",
    "default-norm": "the model's original normalization layers are always used",
    **dict.fromkeys(
        ("use-prompt-extend", "prompt-extend-method", "prompt-extend-model", "prompt-extend-target-lang",
         "use-prompt-enhancer"), _REWRITE),
    **dict.fromkeys(("t5", "text-encoder-path", "t5-tokenizer-path", "override-text-encoder-safetensors"), _TEXT),
    **dict.fromkeys(("slg-layers", "slg-scale", "slg-start", "slg-end", "slg-mode"), _LAYER),
    **dict.fromkeys(("teacache-thresh", "enable-teacache", "use-teacache"), _CACHE),
    "feature-caching": "--cache first-block, mag, sea or taylorseer skips blocks",
    **dict.fromkeys(
        ("cfg-skip-mode", "cfg-apply-ratio", "guidance-scale-high-noise", "timestep-boundary", "boundary",
         "boundary-ratio", "dit-high-noise", "high-noise-model-path", "low-noise-model-path",
         "low-noise-checkpoint", "high-noise-checkpoint"), _TWO),
    "model-type": "the type of a model is read from its files; choose the model with --model",
    **dict.fromkeys(("workload-type", "mode", "inference-mode", "model-cls", "pipeline-config"), _ONLY),
    "config-json": "give settings as options, or in a YAML file (--config)",
    **dict.fromkeys(
        ("torch-compile-kwargs", "compile-args", "compile-backend", "compile-mode", "compile-dynamic",
         "compile-fullgraph", "compile-cache-size-limit"),
        "--compile compiles every block as one graph with Inductor, anew for each size"),
    "vsa-sparsity": "to use VSA, give --attention vsa, and set its sparsity with --sparsity",
    "sta-mode": "sliding tile attention (STA) is not supported; slagen methods lists the attention methods",
    "output-type": "the end of --output says what is written: .mp4, .webm, .gif or .frames; --save-latents writes the "
    "final latents too",
    "interactive": "there is no interactive mode; slagen batch - reads prompts from stdin",
    "latent-path": "slagen decode FILE turns saved latents into a video",
    "trim-tail-frames": "frames are not trimmed; for a shorter video, lower --num-frames",
    "trust-remote-code": "slagen never runs code from a model's repository",
}  # fmt: skip

_CLIPS = (
    "--batch-size is the number of clips per step over all processes; --micro-batch is the number that a device "
    "processes at a time"
)
_RANK = "give --train lora --lora-rank N"
_TORCHRUN = "to train on several GPUs, run torchrun --nproc-per-node N -m slagen finetune"
_TRAINING_MEMORY = "--checkpointing saves memory, and so does --parallel fsdp under torchrun"
# What is said of options in fine-tuning, where it is not as above.
TRAINER_REFUSED = {
    **dict.fromkeys(("max-train-epochs", "num-train-epochs", "epochs"), "set the length of training with --steps"),
    **dict.fromkeys(("network-dim", "rank", "lora", "use-lora", "lora-training"), _RANK),
    **dict.fromkeys(("network-alpha", "lora-alpha"), f"the LoRA alpha equals the rank; {_RANK}"),
    **dict.fromkeys(("network-module", "network-args"), f"--train selects what is trained; for LoRA, {_RANK}"),
    **dict.fromkeys(("network-weights",), "give the weights to start from with --weights"),
    **dict.fromkeys(
        ("dataset-config", "data-path", "dataset", "dataset-name", "instance-data-root", "train-data-dir",
         "data-json-path"), "--data names a folder or list of videos with captions; see slagen finetune data --help"),
    **dict.fromkeys(("gradient-accumulation-steps", "train-batch-size"), _CLIPS),
    **dict.fromkeys(
        ("lr-scheduler", "lr-scheduler-type", "lr-num-cycles"),
        "the learning rate rises over --warmup-steps, stays constant, and decays at the end"),
    **dict.fromkeys(
        ("resume", "resume-from-checkpoint"),
        "to resume, run the same command again with the same --output; --restart starts over"),
    **dict.fromkeys(("num-gpus", "nproc", "nproc-per-node", "sp-size", "tp-size", "multi-gpu"), _TORCHRUN),
    **dict.fromkeys(("blocks-to-swap", "cpu-offload", "enable-model-cpu-offload", "offload-model"), _TRAINING_MEMORY),
    **dict.fromkeys(("sdpa", "torch-sdpa", "xformers", "flash-attn", "flash-attn2", "flash-attn3", "flash3"),
                    "--attention and --backend select how attention is computed"),
    "report-to": "--tensorboard writes event files for TensorBoard",
}  # fmt: skip


def normalize(name: str, *, is_training: bool = False) -> str:
    """An option's name, without its leading dashes, as we spell it: dashes for underscores, our name for another's."""
    name = name.replace("_", "-")
    own = TRAINER_NAMES.get(name.lower()) if is_training else None
    return own or NAMES.get(name.lower(), name)


# Weights of one value do not suit another, or nothing but training uses it.
SET_IN_TRAINING = ("negligible", "linear-domain", "feature-map", "router-tau")


def why_not(name: str, *, is_training: bool = False) -> str | None:
    """What to say of another tool's option that slagen does not have; None for any other option."""
    plain = name.replace("_", "-").lower()
    if plain in SET_IN_TRAINING:
        return f"--{plain} is an option for training only. Use it with slagen finetune --{plain}."
    reason = (TRAINER_REFUSED.get(plain) if is_training else None) or REFUSED.get(plain)
    return None if reason is None else f"--{cut(name)} is an option of other tools that slagen does not have: {reason}."


def translate(
    arguments: list[str], takes_value: Mapping[str, bool], note: Callable[[str], None], *, is_group: bool = False
) -> list[str]:
    """A command's arguments with other tools' names and values in our words.

    Args:
        takes_value: for each spelling of the command's own options, dashes included, whether a value follows it.
        note: called with what works differently than in the other tool.
        is_group: what follows the first word that is not an option belongs to a subcommand.
    Raises: UsageError for an option that slagen does not have, and for two spellings of one option.
    """
    found, left = list[str](), list(arguments)
    given: dict[str, str] = {}  # the spelling of each of our options
    task: str | None = None
    is_training = "--lora-rank" in takes_value
    has_sage = "--backend" in takes_value and not is_training
    while left:
        token = left.pop(0)
        if token == "--" or (is_group and not token.startswith("-")):
            left.insert(0, token)
            break
        if not token.startswith("--"):
            found.append(token)
            if takes_value.get(token) and left:
                found.append(left.pop(0))
            continue
        typed, equals, value = token[2:].partition("=")
        theirs, ours = typed.replace("_", "-").lower(), f"--{normalize(typed, is_training=is_training)}"
        if theirs in HEIGHT_FIRST and "--height" in takes_value:
            left = _height_first(typed, [value, *left] if equals else left)
            continue
        if ours not in takes_value:
            if "--steps" in takes_value and (reason := why_not(typed, is_training=is_training)) is not None:
                raise UsageError(reason)
            found.append(token)
            continue
        if not equals and not (takes_value[ours] and left):
            found.append(ours)
            continue
        value = value if equals else left.pop(0)
        if theirs == "task":
            task = _of_task(value)
            continue
        if given.setdefault(ours, theirs) != theirs:
            raise UsageError(f"--{given[ours]} and --{theirs} are the same option. Give one of them.")
        value = _in_our_words(theirs, value, note, has_sage) if takes_value[ours] else value
        found += [f"{ours}={value}"] if equals else [ours, value]
    if task is not None and "--model" not in given:  # which says where that model lies
        found = ["--model", task, *found]
    return found + left


def _height_first(name: str, values: list[str]) -> list[str]:
    """The arguments behind an option with height and width, with our options for these."""
    if len(values) < 2 or not (values[0].isdecimal() and values[1].isdecimal()):
        raise UsageError(
            f"--{cut(name)} needs two numbers: first the height, then the width. Or give both "
            "as --size 832x480, width first."
        )
    return ["--height", values[0], "--width", values[1], *values[2:]]


def _of_task(value: str) -> str | None:
    """The model of Wan's --task; None for LightX2V's t2v, which leaves it to --model. Raises UsageError."""
    small = value.strip().lower()
    if small in TASKS or small == "t2v":
        return TASKS.get(small)
    for start, reason in (
        ("flf2v", "FLF2V, with a last image, is not supported"),
        ("i2v-a", "Wan2.2, with its two transformers, is not supported"),
        ("ti2v", "Wan2.2 TI2V-5B is not supported"),
        ("vace", "VACE is not supported yet"),
        ("t2i", "images are not supported: slagen generates videos"),
    ):
        if small.startswith(start):
            raise UsageError(f"task is {quote(value)}, but {reason}. Try --task {next(iter(TASKS))}.")
    raise UsageError(f"task is {quote(value)}, but must be {' or '.join(TASKS)}. Or choose a model with --model.")


def _in_our_words(theirs: str, value: str, note: Callable[[str], None], has_sage: bool) -> str:
    """A value of an option that is spelt as another tool has it; `has_sage`: the command has --backend sage."""
    small = value.strip().lower()
    if theirs == "model" and value in MODELS and not Path(value).exists():
        return MODELS[value]
    if theirs not in VALUES:
        return value
    ours = VALUES[theirs].get(small, small)
    if "sage" in small and ours != small:
        advice = "; to use it, give --attention dense --backend sage" if has_sage and ours == "dense" else ""
        note(f"{small} runs as {ours} attention, without SageAttention{advice}")
    return ours
