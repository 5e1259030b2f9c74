"""Stock encoders as ONNX graphs for CPUs: ESM-1b and ESM-2, ESM C, T5 (Ankh, ProtT5, ProstT5) and BERT (ProtBert).

A graph takes one protein without padding, and is built from the weights, not traced: it has one operator each for
rotation, attention and GELU, and no mask. On one core ESM-2 8M takes 68 ms for 350 residues, or 34 in int8, where the
stock forward takes 89. Before its folder gets its name it is run in ONNX Runtime against torch.

int8 is for products with weights: the weights by column, symmetric, and what they meet as a whole, anew in each call.
Embeddings, norms, rotation and attention stay fp32.

Dimensions: L tokens of a protein, M positions, V vocabulary, D width, F width of any input or output of a product,
H heads, K width of a head.
"""

import importlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn
from transformers import EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.models.anatomy import ACTIVATIONS, SQUARE, Encoder, Layer, describe
from hf_plm.models.families import Spelling
from hf_plm.models.locate import ENCODER_FILE
from hf_plm.models.session import FORMAT, GRAPH_FILES, open_session
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES
from hf_plm.version import __version__

TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest number or 1. Found: 1.2e-6 (random weights, 8M and 35M)."""
LEAST_COSINE = 0.9
"""Of int8 to torch, a mean over residues. A graph below it is not kept."""
PROBES = (1, 5, 64, 300, 1100)
"""Residues of the proteins that are compared, where the model takes so many."""
STALE_SECONDS = 86_400
"""After which a folder that was being written is taken for that of a process that was killed."""
OPSET, IR_VERSION = 23, 11  # 23 is the first with Attention, and is in ONNX Runtime since 1.23
_MICROSOFT = ("MatMulIntegerToFloat", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding")
_NONE: Mapping[str, Any] = MappingProxyType({})


def write_graphs(
    model: nn.Module, folder: str | Path, layer: int, spelling: Spelling, facts: dict[str, str], limit: int
) -> Path:
    """Writes the graphs of a stock encoder (fp32, on the CPU, left in eval mode) into a new `folder`, its result.

    `model.onnx` and `model_int8.onnx`, each with its weights in a file beside it, take `input_ids` int64 (1, L), a
    protein of up to `limit` residues and its special tokens, and give `hidden` float32 (1, L, D): transformers' hidden
    state `layer`, 0 the embeddings and -1 the last. `encoder.json` keeps the rest for `session.OnnxEncoder`. Where int8
    is worse than `LEAST_COSINE` its graph is left out.

    Raises `UserError` where a package is missing, the model is of another kind or has not the layer or the positions,
    and where the folder is not empty or cannot be written, and `RuntimeError` where ONNX Runtime computes otherwise
    than torch; then nothing is left behind.
    """
    _require_packages()
    model = model.esm if isinstance(model, EsmForMaskedLM) else model
    encoder = describe(model.eval(), limit + spelling.num_special)
    total = len(encoder.layers)
    if not -total - 1 <= layer <= total:
        raise UserError(f"A layer is from 0 (the embeddings) to {total}, or from -1 (the last) down, not {layer}.")
    layer %= total + 1
    folder = Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        if (folder / ENCODER_FILE).is_file():  # another process has written the same meanwhile
            return folder
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; name another folder for {GRAPH_FILES[False]}, or move that away.")
        for stale in folder.parent.glob(f".{folder.name}.{'[0-9a-f]' * 16}"):  # of an export that was killed
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        for is_int8, name in GRAPH_FILES.items():
            write_graph(encoder, layer, is_int8, temporary / name)
        difference, cosine = compare(temporary, model, layer, spelling, limit)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{folder} was not written: its vectors in ONNX Runtime are off by {difference:.1e}.")
        if not cosine >= LEAST_COSINE:
            for path in temporary.glob(f"{GRAPH_FILES[True]}*"):
                path.unlink()
        known = {"spelling": spelling.as_json(), "facts": facts, "width": encoder.width, "layer": layer, "limit": limit}
        found = {"difference": float(f"{difference:.2g}"), "int8_cosine": float(f"{np.nan_to_num(cosine):.6f}")}
        versions = {"hf_plm": __version__, "onnx": version("onnx"), "onnxruntime": version("onnxruntime")}
        text = json.dumps({"format": FORMAT, **known, **found, "versions": versions}, indent=1)
        (temporary / ENCODER_FILE).write_text(text + "\n", encoding="utf-8")
        _give_name(temporary, folder)
    except OSError as error:
        raise UserError(f"The ONNX folder {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@torch.no_grad()
def compare(folder: Path, model: nn.Module, layer: int, spelling: Spelling, limit: int) -> tuple[float, float]:
    """Of fp32, the largest difference to the stock forward, relative to its largest number or 1; of int8, the cosine.

    Over random proteins of `PROBES` residues, each alone. The cosine is that of the worst of them.
    """
    generator = np.random.default_rng(0)
    lengths = sorted({min(length, limit) for length in PROBES})
    letters = list(STANDARD_RESIDUES.encode())
    probes = [spelling.encode(bytes(generator.choice(letters, length).tolist()))[None] for length in lengths]
    expected = []
    for ids_1L in map(torch.from_numpy, probes):
        # A mask, although nothing is masked: without one, ESM takes tokens with the padding's id for padding.
        outputs = model(ids_1L, attention_mask=torch.ones_like(ids_1L), output_hidden_states=True)
        expected.append(outputs.hidden_states[layer][0].numpy())

    def found(is_int8: bool) -> list[np.ndarray]:
        session = open_session(folder / GRAPH_FILES[is_int8], torch.get_num_threads())
        return [session.run(["hidden"], {"input_ids": ids_1L})[0][0] for ids_1L in probes]

    differences = [np.abs(x_LD - y_LD).max() for x_LD, y_LD in zip(found(False), expected, strict=True)]
    largest = max(1.0, *(np.abs(x_LD).max() for x_LD in expected))
    cosines = []
    for length, x_LD, y_LD in zip(lengths, found(True), expected, strict=True):
        norms_L = np.linalg.norm(x_LD, axis=1) * np.linalg.norm(y_LD, axis=1)
        cosine_L = (x_LD * y_LD).sum(1) / np.maximum(norms_L, 1e-30)
        cosines.append(cosine_L[len(spelling.prefix) :][:length].mean())
    return float(np.max(differences) / largest), float(np.min(cosines))


def _require_packages() -> None:
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'ONNX graphs need {name}, which is not installed: pip install "hf_plm[onnx]".') from error


def _give_name(temporary: Path, folder: Path) -> None:
    for path in temporary.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    try:
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    except OSError:
        if not (folder / ENCODER_FILE).is_file():  # else another process has written the same meanwhile
            raise


@torch.no_grad()
def write_graph(encoder: Encoder, layer: int, is_int8: bool, path: Path) -> None:
    """The file `path`, and beside it `path`.data with all that is larger than 1 KB, since protobuf ends at 2 GB."""
    from onnx import TensorProto, helper

    with path.with_name(f"{path.name}.data").open("wb") as data:
        graph = _Graph(encoder, data, is_int8)
        hidden_LD = graph.embed()
        for one in encoder.layers[:layer]:
            hidden_LD = graph.layer(one, hidden_LD)
        if layer == len(encoder.layers):
            hidden_LD = graph.norm(encoder.final_norm, hidden_LD)
        graph.node("Unsqueeze", hidden_LD, graph.zero, output="hidden")
    ends = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "L"]),
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, "L", encoder.width]),
    ]
    whole = helper.make_graph(graph.nodes, "encoder", ends[:1], ends[1:], graph.constants)
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(whole, opset_imports=domains, ir_version=IR_VERSION).SerializeToString())


class _Graph:
    """A graph in the making. Values go by their names. Weights go to the file of data one by one."""

    def __init__(self, encoder: Encoder, data: BinaryIO, is_int8: bool):
        self.encoder, self.data, self.is_int8 = encoder, data, is_int8
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.whole: dict[str, str] = {}
        self.zero, self.one = self.constant([0]), self.constant([1])
        self.angles = [self.constant(table_MK) for table_MK in encoder.cos_sin or ()]
        self.bias_1HLL = ""

    def constant(self, value: torch.Tensor | list[int]) -> str:
        from onnx import TensorProto, helper, numpy_helper

        tensor = torch.as_tensor(value).detach()
        array = np.ascontiguousarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
        name = f"constant_{len(self.constants)}"
        if array.nbytes <= 1024:
            self.constants.append(numpy_helper.from_array(array, name))
            return name
        self.data.write(bytes(-self.data.tell() % 64))  # to the next line of a cache
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = TensorProto(name=name, dims=array.shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
        place = {"location": Path(self.data.name).name, "offset": self.data.tell(), "length": array.nbytes}
        for key, entry in place.items():
            proto.external_data.add(key=key, value=str(entry))
        self.data.write(array.data)
        self.constants.append(proto)
        return name

    def node(
        self, kind: str, *inputs: str, attributes: Mapping[str, Any] = _NONE, output: str = "", num_outputs: int = 1
    ) -> str:
        """The first output; the others are called the same with .1, .2 behind it."""
        from onnx import helper

        output = output or f"{kind}_{len(self.nodes)}"
        outputs = [output, *(f"{output}.{place}" for place in range(1, num_outputs))]
        domain = "com.microsoft" if kind in _MICROSOFT else ""
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return output

    def product(self, x_LF: str, linear: nn.Linear, divisor: float = 1.0) -> str:
        """A linear module. In int8, products of the same `x_LF` share its conversion to whole numbers."""
        weight_FF = linear.weight.T / divisor
        bias = [] if linear.bias is None else [self.constant(linear.bias / divisor)]
        if not self.is_int8:
            return self.node("Gemm", x_LF, self.constant(weight_FF), *bias)
        if x_LF not in self.whole:
            self.whole[x_LF] = self.node("DynamicQuantizeLinear", x_LF, num_outputs=3)
        whole_LF = self.whole[x_LF]
        scale_F = weight_FF.abs().amax(0).clamp_min(1e-30) / 127
        weight, scale = self.constant((weight_FF / scale_F).round().to(torch.int8)), self.constant(scale_F)
        return self.node("MatMulIntegerToFloat", whole_LF, weight, f"{whole_LF}.1", scale, f"{whole_LF}.2", "", *bias)

    def norm(self, norm: nn.Module | None, x_LF: str) -> str:
        if norm is None:
            return x_LF
        if isinstance(norm, nn.LayerNorm):
            parts = [self.constant(part) for part in (norm.weight, norm.bias) if part is not None]
            return self.node("LayerNormalization", x_LF, *parts, attributes={"axis": -1, "epsilon": norm.eps})
        # T5's, which takes no mean off.
        weight, epsilon = self.constant(norm.get_parameter("weight")), norm.variance_epsilon
        return self.node("RMSNormalization", x_LF, weight, attributes={"axis": -1, "epsilon": epsilon})

    def embed(self) -> str:
        ids_L = self.node("Squeeze", "input_ids", self.zero)
        length_1 = self.node("Shape", ids_L)
        hidden_LD = self.node("Gather", self.constant(self.encoder.embedding_VD), ids_L)
        if self.encoder.positions_MD is not None:
            positions_MD = self.constant(self.encoder.positions_MD)
            hidden_LD = self.node("Add", hidden_LD, self.node("Slice", positions_MD, self.zero, length_1, self.zero))
        if self.encoder.bias_HNSS is not None:
            self.bias_1HLL = self.relative_bias(self.encoder.bias_HNSS, length_1)
        return self.norm(self.encoder.embedding_norm, hidden_LD)

    def relative_bias(self, bias_HNSS: torch.Tensor, length_1: str) -> str:
        """(1, H, L, L), put together from squares, at its peak in twice its memory.

        An eighth of the time of looking up each number (350 tokens, 6 heads: 0.7 ms, not 5.4).
        """
        num_heads, num_squares = bias_HNSS.shape[:2]
        size, farthest = self.constant([SQUARE]), self.constant([num_squares // 2])
        rows_1 = self.node("Div", self.node("Add", length_1, self.constant([SQUARE - 1])), size)
        places_A = self.node("Range", *(self.node("Squeeze", x_1) for x_1 in (self.zero, rows_1, self.one)))
        distance_AA = self.node("Sub", places_A, self.node("Unsqueeze", places_A, self.one))
        near_AA = self.node("Max", self.node("Min", distance_AA, farthest), self.node("Neg", farthest))
        which_AA = self.node("Add", near_AA, farthest)
        squares_HAASS = self.node("Gather", self.constant(bias_HNSS), which_AA, attributes={"axis": 1})
        rows_HASAS = self.node("Transpose", squares_HAASS, attributes={"perm": [0, 1, 3, 2, 4]})
        length_up_1 = self.node("Mul", rows_1, size)
        shape = self.node("Concat", self.constant([1, num_heads]), length_up_1, length_up_1, attributes={"axis": 0})
        whole_1HLL = self.node("Reshape", rows_HASAS, shape)
        lengths_2 = self.node("Concat", length_1, length_1, attributes={"axis": 0})
        return self.node("Slice", whole_1HLL, self.constant([0, 0]), lengths_2, self.constant([2, 3]))

    def layer(self, layer: Layer, hidden_LD: str) -> str:
        is_pre_norm = self.encoder.is_pre_norm
        for norm, branch in ((layer.attention_norm, self.attention), (layer.feed_norm, self.feed_forward)):
            added_LD = branch(layer, self.norm(norm, hidden_LD) if is_pre_norm else hidden_LD)
            hidden_LD = self.node("Add", hidden_LD, added_LD)
            if not is_pre_norm:
                hidden_LD = self.norm(norm, hidden_LD)
        return hidden_LD

    def attention(self, layer: Layer, x_LD: str) -> str:
        """Where there is a bias ONNX's operator is faster (350 tokens, 6 heads of 64: 2.4 ms, not 2.6), elsewhere ONNX
        Runtime's, which keeps no scores (20 heads of 16: 2.8 ms, not 3.4; but of 100 tokens 0.35, not 0.28)."""
        query, key, value = (self.product(x_LD, linear) for linear in (layer.query, layer.key, layer.value))
        query, key = self.norm(layer.query_norm, query), self.norm(layer.key_norm, key)
        query, key, value = (self.node("Unsqueeze", x_LF, self.zero) for x_LF in (query, key, value))
        heads = self.encoder.num_heads
        if self.angles:
            for_heads: dict[str, Any] = {"num_heads": heads}
            query, key = (
                self.node("RotaryEmbedding", x_1LF, self.zero, *self.angles, attributes=for_heads)
                for x_1LF in (query, key)
            )
        if self.bias_1HLL:
            for_heads = {"q_num_heads": heads, "kv_num_heads": heads, "scale": self.encoder.scale}
            out_1LF = self.node("Attention", query, key, value, self.bias_1HLL, attributes=for_heads)
        else:
            for_heads = {"num_heads": heads, "scale": self.encoder.scale}
            out_1LF = self.node("MultiHeadAttention", query, key, value, attributes=for_heads)
        return self.product(self.node("Squeeze", out_1LF, self.zero), layer.out, self.encoder.divisor)

    def feed_forward(self, layer: Layer, x_LD: str) -> str:
        kind, attributes = ACTIVATIONS[self.encoder.activation]
        raised_LF = self.node(kind, self.product(x_LD, layer.gate or layer.up), attributes=attributes)
        if layer.gate is not None:
            raised_LF = self.node("Mul", raised_LF, self.product(x_LD, layer.up))
        return self.product(raised_LF, layer.down, self.encoder.divisor)
