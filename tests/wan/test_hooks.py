"""SLA in a transformer whose layers others hook, wrap, quantise, offload or compile."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from wan_models import build_pipeline, build_transformer, run

import slagen
from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.sla import SLAMetadata, weights_hash
from slagen.wan.install import load_sla, save_sla
from slagen.wan.processor import processors

accelerate = pytest.importorskip("accelerate")
CONFIG = SLAConfig(sparsity=0.6, block_m=16, block_n=16)
CPU = torch.device("cpu")
DOMAINS = ["all", "marginal"]


def randomise(transformer) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for processor in processors(transformer):
            for parameter in processor.proj_l.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def build(config: SLAConfig = CONFIG):
    model = build_transformer()
    slagen.apply_sla(model, config)
    randomise(model)
    return model


def call(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 3, 8, 8, generator=generator), timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=generator), return_dict=False,
        )[0]  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return call(build())


def group(level: str, disk: bool = False):
    def offload(model, folder):
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        if disk:
            options["offload_to_disk_path"] = str(folder)
        apply_group_offloading(model, onload_device=CPU, offload_type=level, **options)

    return offload


# How a model's layers are moved in and out. The second says whether their weights are away between calls.
OFFLOADING = {
    "accelerate-cpu": (lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU), True),
    "accelerate-disk": (lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU), True),
    "accelerate-model": (lambda model, folder: accelerate.cpu_offload_with_hook(model, execution_device=CPU), False),
    "accelerate-processors": (
        lambda model, folder: accelerate.cpu_offload(model, CPU, preload_module_classes=["SLAProcessor"]), True,
    ),
    "group-leaf": (group("leaf_level"), True),
    "group-block": (group("block_level"), True),
    "group-leaf-disk": (group("leaf_level", disk=True), True),
    "group-block-disk": (group("block_level", disk=True), True),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFLOADING)
def test_offloading_changes_nothing(kind, expected, tmp_path):
    """The weights of `proj_l` come when it is called: without that they were on meta, or noise, which became NaN."""
    model = build()
    OFFLOADING[kind][0](model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(call(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OFFLOADING)
def test_weights_that_are_away_are_neither_read_nor_written(kind, tmp_path):
    """Putting SLA in, saving it and taking it out need the weights. If the model moves as a whole they are here."""
    offload, away = OFFLOADING[kind]
    pipe = build_pipeline()
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(pipe.transformer), "all", 1)
    slagen.apply_sla(pipe, CONFIG)
    randomise(pipe.transformer)
    base = {name: x.clone() for name, x in pipe.transformer.state_dict().items() if "proj_l" not in name}
    pipe.transformer.blocks[0].attn1.to_q.weight.data += 1
    file = save_sla(pipe, tmp_path, metadata, base)

    before, loaded = build_transformer(), build_transformer()
    load_sla(loaded, file)
    offload(before, tmp_path / "before")
    offload(loaded, tmp_path / "loaded")
    todo = [
        ("loaded", lambda: load_sla(before, file)),
        ("installed", lambda: slagen.apply_sla(before, CONFIG)),
        ("saved", lambda: save_sla(loaded, tmp_path / "again", metadata)),
        ("removed", lambda: slagen.remove_sla(loaded)),
    ]
    if away:
        for words, action in todo:
            with pytest.raises(UsageError, match=rf"SLA.* cannot be {words} while \w+ offloads .*layers"):
                action()
    else:
        for _, action in (todo[0], *todo[2:]):
            action()


def test_sequential_offloading_of_a_pipeline(monkeypatch):
    """`enable_sequential_cpu_offload` wants an accelerator; what it does is this."""
    pipe, plain = build_pipeline(), build_pipeline()
    for each in (pipe, plain):
        slagen.apply_sla(each, CONFIG)
        randomise(each.transformer)
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        accelerate.cpu_offload(part, CPU, offload_buffers=True)
    torch.testing.assert_close(run(pipe, steps=1), run(plain, steps=1), atol=1e-4, rtol=1e-4)


def test_layerwise_casting_is_that_of_the_weights(expected):
    """fp8 weights, which are wide only while their layer runs."""
    model, rounded = build(), build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = dict(model.named_parameters())
    assert stored["blocks.0.attn1.processor.proj_l.weight"].dtype == torch.float8_e4m3fn
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(stored[name].float())
    torch.testing.assert_close(call(model), call(rounded), atol=1e-5, rtol=1e-5)


def test_sla_weights_go_in_before_others_round_the_base(tmp_path):
    """Cast or quantised, the base has another hash, which was told as another model."""
    pipe = build_pipeline()
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(pipe.transformer), "all", 1)
    slagen.apply_sla(pipe, CONFIG)
    randomise(pipe.transformer)
    file = save_sla(pipe, tmp_path, metadata)
    cast, quantised = build_transformer(), build_transformer()
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    doubled(quantised.blocks[1].ffn.net[2])
    for model, words in ((cast, "Parameter of torch.float8_e4m3fn"), (quantised, "net.2.weight is Quantised")):
        with pytest.raises(UsageError, match=f"cannot be loaded into quantised weights .*{words}.*Load them before"):
            load_sla(model, file)


# What stands in the place of proj_l


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("branches", ["both", "linear", "sparse"])
def test_a_hook_sees_the_linear_branch(domain, branches):
    """(B, H, L, D) go in and come out, as in the published module; what a hook returns takes effect."""
    attention = slagen.SparseLinearAttention(8, SLAConfig(0.6, linear_domain=domain, block_m=16, block_n=16))
    attention.branches = branches
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3))
    torch.nn.init.normal_(attention.proj_l.weight, generator=generator)
    torch.nn.init.normal_(attention.proj_l.bias, generator=generator)
    plain, seen = attention(q, k, v), []
    handle = attention.proj_l.register_forward_hook(lambda module, args, o: seen.append((args[0], o)))
    torch.testing.assert_close(attention(q, k, v), plain, atol=1e-6, rtol=1e-5)
    handle.remove()
    assert len(seen) == (branches != "sparse")
    if branches != "sparse":
        o_linear, projected = seen[0]
        torch.testing.assert_close(projected, attention.proj_l(o_linear))
        attention.proj_l.register_forward_hook(lambda module, args, o: 0 * o)
        expected = slagen.sparse_linear_attention(q, k, v, attention.config) if branches == "both" else 0 * q
        assert torch.equal(attention(q, k, v), expected)


def test_hooks_of_the_module_run():
    model, seen = build(), []
    model.blocks[1].attn1.processor.register_forward_hook(lambda module, args, o: seen.append(o.shape) or 0 * o)
    call(model)
    assert seen == [(1, 2, 48, 16)]


def test_gradients_through_a_called_projection():
    attention = slagen.SparseLinearAttention(8, SLAConfig(0.6, block_m=16, block_n=16)).double()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    torch.nn.init.normal_(attention.proj_l.weight, generator=generator)
    inputs = [x.requires_grad_() for x in (q, k, v)] + list(attention.proj_l.parameters())
    plain = torch.autograd.grad(attention(q, k, v).square().sum(), inputs)
    attention.proj_l.register_forward_hook(lambda *_: None)
    called = torch.autograd.grad(attention(q, k, v).square().sum(), inputs)
    for a, e in zip(called, plain, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_called_projection_in_half_precision(dtype):
    """proj_l in float32 or in the tokens' dtype: within what rounding O^l to that dtype costs, under autocast too."""
    attention = slagen.SparseLinearAttention(8, SLAConfig(0.6, block_m=16, block_n=16))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator).to(dtype) for _ in range(3))
    torch.nn.init.normal_(attention.proj_l.weight, generator=generator)
    plain = attention(q, k, v)
    attention.proj_l.register_forward_hook(lambda *_: None)
    for weights in (torch.float32, dtype):
        attention.proj_l.to(weights)
        with torch.autocast("cpu", dtype):
            called = attention(q, k, v)
        assert called.dtype == dtype
        assert (called - plain).abs().max() <= 8 * torch.finfo(dtype).eps * plain.abs().max()


class Scaled(torch.nn.Module):
    """A layer around another that has no weight of its own, as quantised layers have none that is a number."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", inner.weight.detach().mul(64).round().to(torch.int8))
        self.bias = inner.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


class Quantised(torch.Tensor):
    """Stands for torchao's weights: a tensor that has its own way of being multiplied with."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, bias = args
            return torch.nn.functional.linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def doubled(layer) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param(lambda p: setattr(p, "proj_l", Scaled(p.proj_l)), lambda w: (w * 64).round() / 64, id="layer"),
        pytest.param(lambda p: doubled(p.proj_l), lambda w: 2 * w, id="tensor"),
        pytest.param(
            lambda p: torch.nn.utils.parametrize.register_parametrization(p.proj_l, "weight", torch.nn.Tanh()),
            torch.tanh, id="parametrised",
        ),
    ],
)  # fmt: skip
def test_other_layers_and_weights_have_their_own_way(change, same):
    model, expected = build(), build()
    with torch.no_grad():
        for processor in processors(model):
            processor.proj_l.weight.mul_(0.25)
        for processor, other in zip(processors(model), processors(expected), strict=True):
            other.proj_l.weight.copy_(same(processor.proj_l.weight))
            change(processor)
    torch.testing.assert_close(call(model), call(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_by_bitsandbytes(kind, expected):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build()
    for processor in processors(model):
        old = processor.proj_l
        options = {"compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
        new = getattr(bitsandbytes.nn, kind)(16, 16, **options)
        new.load_state_dict(old.state_dict())
        processor.proj_l = new.to("cpu")
    found = call(model)
    assert found.isfinite().all() and (found - expected).abs().max() < 0.3 * expected.abs().max()


# LoRA


def all_linear(model) -> None:
    """Adapters on every linear layer, `proj_l` among them, none of which is without effect."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def test_adapters_on_proj_l_have_effect(expected):
    """What its own multiplied-out weights would give."""
    model, merged = build(), build()
    torch.manual_seed(0)
    all_linear(model)
    layers = [processor.proj_l for processor in processors(model)]
    assert all(hasattr(layer, "lora_A") for layer in layers)
    adapted = call(model)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            with torch.no_grad():
                merged.get_submodule(name).weight.add_(module.get_delta_weight("default"))
    torch.testing.assert_close(adapted, call(merged), atol=1e-4, rtol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(call(model), expected, atol=1e-5, rtol=1e-5)


def test_a_lora_before_the_sla_weights_is_named(tmp_path):
    """It changes the base's weights, or their names, so that the file seemed to be made for another model."""
    pipe = build_pipeline()
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(pipe.transformer), "all", 1)
    slagen.apply_sla(pipe, CONFIG)
    randomise(pipe.transformer)
    file = save_sla(pipe, tmp_path, metadata)
    slagen.remove_sla(pipe)
    all_linear(pipe.transformer)
    with pytest.raises(UsageError, match=r"while a LoRA is loaded \(default\).*unload_lora_weights"):
        load_sla(pipe, file)
    pipe.fuse_lora(["transformer"])
    for each in (pipe, pipe.transformer):
        with pytest.raises(UsageError, match="while a LoRA is (fused|loaded)"):
            load_sla(each, file)
    pipe.transformer.unload_lora()
    with pytest.raises(UsageError, match=r"while a LoRA is fused \(default\).*unfuse_lora"):
        load_sla(pipe, file)
    with pytest.raises(WeightsError, match="a LoRA fused into it"):
        load_sla(pipe.transformer, file)


def test_a_lora_after_the_sla_weights(tmp_path):
    """Saving would mix the two; taking SLA out puts the base back beside the LoRA, unless that is fused into it."""
    pipe, plain = build_pipeline(), build_transformer()
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(plain), "all", 1)
    slagen.apply_sla(pipe, CONFIG)
    randomise(pipe.transformer)
    base = {name: x.clone() for name, x in pipe.transformer.state_dict().items() if "proj_l" not in name}
    pipe.transformer.blocks[0].attn1.to_q.weight.data += 1
    file = save_sla(pipe, tmp_path, metadata, base)
    slagen.remove_sla(pipe)
    pipe.transformer.load_state_dict(plain.state_dict())
    load_sla(pipe, file)
    all_linear(pipe.transformer)
    with pytest.raises(UsageError, match="saved while a LoRA is loaded"):
        save_sla(pipe, tmp_path, metadata)
    pipe.fuse_lora(["transformer"])
    with pytest.raises(UsageError, match="removed while a LoRA is fused"):
        slagen.remove_sla(pipe)
    pipe.unfuse_lora(["transformer"])
    slagen.remove_sla(pipe)
    found = pipe.transformer.blocks[0].attn1.to_q.base_layer.weight
    torch.testing.assert_close(found, plain.blocks[0].attn1.to_q.weight, atol=1e-5, rtol=1e-5)


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_torch_backend_is_one_node_of_a_graph(domain):
    """`torch.get_num_threads()` and lists whose length depends on numbers broke the graph."""
    config = SLAConfig(0.6, linear_domain=domain, block_m=16, block_n=16)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3)]
    inputs += [torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)]

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = attend(*leaves[:3], config, *leaves[3:], backend="torch")
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    torch.compiler.reset()
    compiled = torch.compile(slagen.sparse_linear_attention, backend="aot_eager", fullgraph=True)
    for a, e in zip(gradients(compiled), gradients(slagen.sparse_linear_attention), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False])
def test_the_torch_backends_operator_is_well_registered(sparse):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3)]
    drawn += [torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)]
    inputs = [x.requires_grad_() for x in drawn]
    for domain, proj in (("all", inputs[3:]), ("marginal", inputs[3:]), ("all", [None, None])):
        arguments = (*inputs[:3], *proj, 0.6, 0.0, domain, "softmax", 16, 16, 0.25, sparse)
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.slagen.blockwise_forward.default, arguments, test_utils=utils)


@pytest.mark.slow
def test_a_whole_model_compiles_into_one_graph():
    """One layer has its plain projection, the other a hook on it."""
    model = build()
    processors(model)[0].proj_l.register_forward_hook(lambda module, args, o: 2 * o)
    torch.compiler.reset()
    torch.testing.assert_close(call(torch.compile(model, backend="eager", fullgraph=True)), call(model))
