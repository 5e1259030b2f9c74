"""Compiled layers: the same numbers, one graph, and nothing compiled anew for a micro-batch of another shape."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from test_packed import pack, random_sequences, spread
from torch._dynamo.testing import CompileCounterWithBackend

from hf_plm.config import Recipe, UserError
from hf_plm.models import layers
from hf_plm.models.attention import Packing
from hf_plm.models.objective import PackedMaskedLM, Shape, filled
from hf_plm.models.packed import packed_hidden_states
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import EOS_ID, IGNORED_LABEL
from hf_plm.training import start

SHAPE = Shape(tokens=256, crop=100)
BATCHES = ((40, 7, 93), (40, 7, 93, 100), (100,), (20,) * 12, (3,) * 60, (100, 100, 56))


def micro_batch(lengths, seed=0):
    input_ids_T, position_ids_T, cu_seqlens, max_seqlen = pack(random_sequences(lengths, seed=seed))
    is_target_T = torch.rand(len(input_ids_T), generator=torch.Generator().manual_seed(seed)) < 0.3
    labels_T = torch.where(is_target_T, input_ids_T, IGNORED_LABEL)
    return input_ids_T, labels_T, position_ids_T, cu_seqlens, max_seqlen, is_target_T.nonzero().squeeze(1)


def modules():
    model = spread(build_model(esm_config("demo", num_layers=3, width=32, num_heads=2), 0))
    return PackedMaskedLM(model).train(), PackedMaskedLM(model, SHAPE).train()


def loss_and_gradients(module, batch):
    module.zero_grad()
    loss, num_targets, num_correct = module(*batch)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
    return loss.detach(), num_targets, num_correct, torch.cat(gradients)


@pytest.fixture
def compiled_by(monkeypatch):
    """Sets what makes code of the graphs, and counts them."""

    def set_backend(backend):
        counter = CompileCounterWithBackend(backend)
        function = layers.compiled_layer.__wrapped__(counter)
        monkeypatch.setattr(layers, "compiled_layer", lambda: function)
        return counter

    torch._dynamo.reset()
    yield set_backend
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
        ),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_layers_give_the_same_and_are_compiled_once(backend, precision, compiled_by):
    counter = compiled_by(backend)
    plain, compiled = modules()
    tolerance = 1e-5 if precision == "fp32" else 0.02
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for seed, lengths in enumerate(BATCHES):
            batch = micro_batch(lengths, seed)
            expected, found = loss_and_gradients(plain, batch), loss_and_gradients(compiled, batch)
            assert found[1] == expected[1]
            torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
            assert (found[3] - expected[3]).abs().max() < tolerance * expected[3].abs().max()
    # What comes before attention by sequence, which stays outside of any graph, and what comes after: of all layers.
    assert counter.frame_count == 2


def test_sizes_are_constants_though_another_was_tried_first(compiled_by):
    counter = compiled_by("eager")
    assert layers.compile_obstacle(torch.device("cpu")) == ""
    tried = counter.frame_count
    for seed, lengths in enumerate(BATCHES[:3]):
        loss_and_gradients(modules()[1], micro_batch(lengths, seed))
    assert counter.frame_count == 2 * tried == 4
    inputs = [node for node in counter.graphs[tried].graph.nodes if node.op == "placeholder"]
    sizes = [size for node in inputs for size in getattr(node.meta.get("example_value"), "shape", ())]
    assert SHAPE.tokens in sizes
    assert all(isinstance(size, int) for size in sizes)


def test_without_the_filling_each_shape_is_compiled(compiled_by):
    """The twin: what the filling saves."""
    counter = compiled_by("eager")
    plain, _ = modules()
    for lengths in BATCHES[:2]:
        input_ids_T, _, position_ids_T, cu_seqlens, max_seqlen, _ = micro_batch(lengths)
        layers.use_packed_layers(plain.model)
        packed_hidden_states(plain.model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen, is_compiled=True)
    assert counter.frame_count > 2


def test_with_the_kernel_a_layer_is_one_graph():
    """Of the route that GPUs take, traced here and not run; `fullgraph` raises where a graph would break."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: F401 (torch before 2.10 does not have it)

    traced = []

    def backend(graph, examples):
        traced.append(graph)
        return lambda *inputs: (torch.zeros(SHAPE.tokens, 32),)

    torch._dynamo.reset()
    layer = modules()[0].model.esm.encoder.layer[0]
    tables = (torch.ones(SHAPE.tokens, 1, 16), torch.zeros(SHAPE.tokens, 1, 16))
    bounds = torch.tensor([0, 100, 200, SHAPE.tokens], dtype=torch.int32)
    function = torch.compile(layers.packed_layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        function(layer, torch.zeros(SHAPE.tokens, 32), *tables, bounds, None, SHAPE.crop)
    assert len(traced) == 1
    assert "varlen" in str(traced[0].code)
    with pytest.raises(torch._dynamo.exc.Unsupported):  # the twin: the other route breaks it
        function(layer, torch.zeros(SHAPE.tokens, 32), *tables, bounds, bounds, SHAPE.crop)


def test_with_the_kernel_any_number_of_sequences_is_one_graph(monkeypatch):
    traced = []

    def backend(graph, examples):
        traced.append(graph)
        return lambda *inputs: (torch.zeros(SHAPE.tokens, 32),)

    torch._dynamo.reset()
    function = layers.compiled_layer.__wrapped__(backend)
    monkeypatch.setattr(layers, "compiled_layer", lambda: function)
    layer = modules()[0].model.esm.encoder.layer[0]
    tables = (torch.ones(SHAPE.tokens, 1, 16), torch.zeros(SHAPE.tokens, 1, 16))
    for bounds in ([0, 100, 200, 256], [0, 60, 120, 180, 256], [0, 10, 20, 90, 120, 180, 256]):
        packing = Packing(torch.tensor(bounds, dtype=torch.int32), None, SHAPE.crop, *tables, is_compiled=True)
        with torch.no_grad():
            layer(torch.zeros(SHAPE.tokens, 32), packing=packing)
    assert len(traced) == 1


def test_recomputed_layers_are_compiled_only_where_asked(monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    monkeypatch.setattr(start, "engine_name", lambda accelerator: "DDP")
    monkeypatch.setattr(start, "compile_obstacle", lambda device: "")
    recipe = Recipe().replace(model__activation_checkpointing=True)
    assert start.shape_to_compile(recipe, accelerator) is None
    assert start.shape_to_compile(recipe.replace(run__compile=True), accelerator) is not None


@pytest.mark.parametrize("lengths", BATCHES)
def test_the_filling_is_sequences_of_their_own(lengths):
    input_ids_T, _, position_ids_T, cu_seqlens, max_seqlen, _ = micro_batch(lengths)
    ids, positions, bounds, longest = filled(input_ids_T, position_ids_T, cu_seqlens, max_seqlen, SHAPE)
    num_tokens = len(input_ids_T)
    assert len(ids) == len(positions) == bounds[-1] == SHAPE.tokens
    assert longest == SHAPE.crop
    assert torch.equal(ids[:num_tokens], input_ids_T)
    assert (ids[num_tokens:] == EOS_ID).all()
    assert torch.equal(bounds[: len(cu_seqlens)], cu_seqlens)
    assert bounds.dtype == cu_seqlens.dtype
    assert 0 < bounds.diff().min() <= bounds.diff().max() <= SHAPE.crop


@pytest.mark.parametrize(
    ("wanted", "device", "engine", "obstacle", "expected"),
    [
        (None, "cpu", "one process", "", None),
        (None, "cuda", "DDP", "", SHAPE),
        (None, "cuda", "ZeRO-3", "", None),
        (None, "cuda", "one process", "no Triton", None),
        (False, "cuda", "one process", "", None),
        (True, "cpu", "one process", "", SHAPE),
        (True, "cpu", "one process", "no compiler", UserError),
        (True, "cuda", "ZeRO-3", "", UserError),
    ],
)
def test_what_is_compiled(wanted, device, engine, obstacle, expected, monkeypatch, capsys):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1, is_main_process=True)
    monkeypatch.setattr(start, "engine_name", lambda accelerator: engine)
    monkeypatch.setattr(start, "compile_obstacle", lambda device: obstacle)
    recipe = Recipe().replace(run__compile=wanted, batch__tokens=SHAPE.tokens, data__crop=SHAPE.crop)
    if expected is UserError:
        with pytest.raises(UserError, match="cannot be compiled"):
            start.shape_to_compile(recipe, accelerator)
        return
    assert start.shape_to_compile(recipe, accelerator) == expected
    is_told = wanted is None and device == "cuda" and expected is None
    assert ("run uncompiled" in capsys.readouterr().out) == is_told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_on_a_gpu():
    """The same numbers to bf16, one graph for forward and backward of all layers, and no wait for the device."""
    torch._dynamo.reset()
    plain, compiled = (module.cuda() for module in modules())
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for seed, lengths in enumerate(BATCHES):
        batch = [x.cuda() if isinstance(x, torch.Tensor) else x for x in micro_batch(lengths, seed)]
        with torch.autocast("cuda", torch.bfloat16):
            expected, found = loss_and_gradients(plain, batch), loss_and_gradients(compiled, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0)
        assert (found[3] - expected[3]).abs().max() < 0.05 * expected[3].abs().max()
    assert counters["unique_graphs"] - before == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        for module in (plain, compiled):
            with torch.autocast("cuda", torch.bfloat16):
                loss_and_gradients(module, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_obstacle_is_named(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(layers, "compiled_layer", lambda: fails)
    assert layers.compile_obstacle(torch.device("cpu")) == "RuntimeError: no compiler here"
