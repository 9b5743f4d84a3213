#!/usr/bin/env python3
"""Makes tests/fixtures/quant: small quantised weights as checkpoints have them, packed by the packages that write such checkpoints,
and beside each what the same package says that the weight is.

    python3 scripts/quant_fixtures.py [NAME ..]    # all whose packages can be imported, or those named

All run on a CPU. The packages need two versions of transformers, so take two environments, each with torch, numpy and safetensors:

    old/bin/pip install transformers==4.51.3 peft==0.10 accelerate datasets gekko rouge
    old/bin/pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9 compressed-tensors==0.10.2
    new/bin/pip install transformers accelerate tokenicer device-smi threadpoolctl defuser logbar pypcre
    new/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    new/bin/pip install --no-deps compressed-tensors==0.20.1 bitsandbytes==0.50.2

`expected` is [K, C], the columns `columns` [C] of W in y = x·W, in f32. Where a package computes in the dtype of its scales, they
are made f32 for that, so that it is exact. The tests compare every bit of it (tests/suites/loaders.rs). The file's metadata names
the package and its version.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "quant"
FIXTURES = {}


def fixture(package, *variants):
    """Registers NAME(*variant) for each `(suffix, variant)`, which gives the tensors of a checkpoint and W, of `package`."""

    def register(make):
        for suffix, *variant in variants:
            FIXTURES["_".join([make.__name__, suffix])] = (package, lambda variant=variant: make(*variant))
        return make

    return register


def write(name):
    package, make = FIXTURES[name]
    torch.manual_seed(sum(name.encode()))
    try:
        tensors, weight = make()
    except ImportError as error:
        print(f"{name}: left as it is, {error}", file=sys.stderr)
        return
    # Both ends, and both sides of whatever ends at a multiple of eight or is 128 wide.
    ends = {0, 1, 2, 7, 8, 9, 127, 128, weight.shape[1] - 1}
    columns = sorted(column for column in ends if column < weight.shape[1])
    tensors["columns"] = torch.tensor(columns, dtype=torch.int64)
    tensors["expected"] = weight.float()[:, columns]
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.safetensors"
    save_file(tensors, path, {"package": f"{package} {version(package)}"})
    print(f"{path.name}: {path.stat().st_size} bytes, {package} {version(package)}")


def random_linear(k, n, dtype=torch.float32, shift=0.0):
    """A layer of K inputs and N outputs, without a bias; every other output's weights are `shift` higher, or lower."""
    linear = torch.nn.Linear(k, n, bias=False)
    signs = torch.tensor([1.0, -1.0]).repeat(n)[:n, None]
    linear.weight.data = (torch.randn(n, k) + shift * signs).to(dtype)
    return linear


def min_max(weight, groups, symmetric):
    """f16 scales and zero points, as floats [N, groups], of the rows of `weight` whose groups `groups` [K] names."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / 15).half().float()
        zero = torch.full_like(scale, 8) if symmetric else torch.round(-low / scale).clamp(0, 15)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def representable(linear, scales, zeros, groups):
    """Rounds the weights of the layer to what codes from 0 to 15 stand for."""
    scale, zero = scales[:, groups], zeros[:, groups]
    codes = torch.round(linear.weight.data.float() / scale + zero).clamp(0, 15)
    linear.weight.data = scale * (codes - zero)


def group_index(k, group, act_order):
    """g_idx [K]: rows in order, or in the order of random activations' magnitudes."""
    rows = torch.randperm(k) if act_order else torch.arange(k)
    groups = torch.empty(k, dtype=torch.int32)
    groups[rows] = torch.arange(k, dtype=torch.int32) // (k if group == -1 else group)
    return groups


# ---- GPTQ ----


@fixture(
    "auto-gptq",
    ("g32", 96, 32, False, False),
    ("g64", 128, 64, False, False),
    ("g128", 256, 128, False, False),
    ("column", 160, -1, False, False),
    ("symmetric_g64", 128, 64, True, False),
    ("act_order_g32", 128, 32, False, True),
    ("symmetric_act_order_g32", 128, 32, True, True),
)
def gptq_v1(k, group, symmetric, act_order):
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    n = 32
    groups = group_index(k, group, act_order)
    linear = random_linear(k, n)
    scales, zeros = min_max(linear.weight.data, groups, symmetric)
    # AutoGPTQ stores zero points minus one, and cannot store 0.
    zeros = zeros.clamp(1, 15)
    representable(linear, scales, zeros, groups)
    layer = QuantLinear(4, group, k, n, bias=False, weight_dtype=torch.float32)
    layer.pack(linear, scales, zeros.clone(), groups)
    weight = layer(torch.eye(k))
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales.half(), "g_idx": layer.g_idx}
    return tensors, weight


def gptqmodel_layer(k, n, group, symmetric, act_order, shift):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    groups = group_index(k, group, act_order)
    linear = random_linear(k, n, shift=shift)
    scales, zeros = min_max(linear.weight.data, groups, symmetric)
    representable(linear, scales, zeros, groups)
    layer = TorchLinear(4, group, symmetric, act_order, k, n)
    layer.pack_original(linear, scales, zeros, groups)
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    tensors = {key: value.clone() for key, value in tensors.items()}
    return layer, tensors


def gptqmodel_weight(layer):
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear

    layer.scales = layer.scales.float()
    return PackableQuantLinear.dequantize_weight(layer)


@fixture(
    "gptqmodel",
    # Zero points from 0 to 15.
    ("g32", 96, 16, 32, False, False, 2.5),
    ("column", 40, 16, -1, False, False, 0.0),
    ("symmetric_g128", 256, 8, 128, True, False, 0.0),
    ("act_order_g64", 128, 16, 64, False, True, 0.0),
    # Groups of 256, which two of 128 with the same scale are; and a last group of fewer rows.
    ("g256", 512, 8, 256, False, False, 0.0),
    ("uneven_g64", 104, 8, 64, False, True, 0.0),
)
def gptq_v2(*problem):
    layer, tensors = gptqmodel_layer(*problem)
    return tensors, gptqmodel_weight(layer)


@fixture("gptqmodel", ("g32", 96, 16, 32, False, False, 2.5), ("symmetric_g64", 128, 8, 64, True, False, 0.0))
def gptq_v1_of_v2(*problem):
    """Zero points of 0, which take their one from the next nibble; the weight is that of the same file read back as v2."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    layer, tensors = gptqmodel_layer(*problem)
    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=4))
    tensors["qzeros"] = layer.qzeros.clone()
    convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)
    return tensors, gptqmodel_weight(layer)


# ---- AWQ ----


@fixture(
    "autoawq",
    ("g32", 96, 32, False, 2.5),
    ("g64", 128, 64, False, 0.0),
    ("g128", 256, 128, False, 0.0),
    ("column", 160, -1, False, 0.0),
    ("symmetric_g64", 128, 64, True, 0.0),
)
def awq(k, group, symmetric, shift):
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    n, group = 32, k if group == -1 else group
    groups = group_index(k, group, False)
    linear = random_linear(k, n, shift=shift)
    scales, zeros = min_max(linear.weight.data, groups, symmetric)
    representable(linear, scales, zeros, groups)
    layer = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group)
    return {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}, weight


# ---- compressed-tensors ----


def compressed_args(group, symmetric, **more):
    from compressed_tensors.quantization import QuantizationArgs

    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **strategy, **more)


def compressed_state(weight, groups, args):
    """Scales in bf16 and zero points [N, groups] of a weight [N, K], by the package's own formula."""
    from compressed_tensors.quantization.utils import calculate_qparams

    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    both = [calculate_qparams(part.amin(1), part.amax(1), args) for part in parts]
    scale, zero = (torch.stack(each, 1) for each in zip(*both))
    return {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}


@fixture(
    "compressed-tensors",
    ("symmetric_g32", 96, 8, 32, True),
    ("symmetric_column", 40, 12, -1, True),
    ("asymmetric_g128", 256, 12, 128, False),
    ("asymmetric_column", 44, 16, -1, False),
    ("asymmetric_g64", 128, 20, 64, False),
)
def compressed_tensors(k, n, group, symmetric):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationScheme

    args = compressed_args(group, symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = random_linear(k, n, torch.bfloat16).weight.data
    tensors = Compressor.compress(compressed_state(weight, group_index(k, group, False), args), scheme)
    scale = tensors["weight_scale"].float()
    return tensors, Compressor.decompress({**tensors, "weight_scale": scale}, scheme)["weight"].T


@fixture("compressed-tensors", ("g32", 96, 8, 32))
def compressed_tensors_act_order(k, n, group):
    """Versions up to 0.10 write g_idx, and read it back where zero points are none."""
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor

    args = compressed_args(group, True, actorder="group")
    groups = group_index(k, group, True)
    state = compressed_state(random_linear(k, n, torch.bfloat16).weight.data, groups, args)
    scale, zero = state["weight_scale"], state["weight_zero_point"]
    compressor = PackedQuantizationCompressor()
    tensors = compressor.compress_weight(state["weight"], scale, args, zero_point=zero, g_idx=groups)
    tensors.update(weight_scale=scale, weight_g_idx=groups)
    return tensors, compressor.decompress_weight({**tensors, "weight_scale": scale.float()}, args).T


@fixture("compressed-tensors", ("blocks_of_outputs", 8, 130), ("blocks_of_inputs", 132, 8))
def compressed_tensors_fp8(k, n):
    """Blocks of 128 × 128, the last ones smaller."""
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = random_linear(k, n).weight.data
    blocks = [[part.abs().amax() for part in rows.split(128, 1)] for rows in weight.split(128, 0)]
    state = {"weight": weight, "weight_scale": torch.tensor(blocks) / 448}
    tensors = Compressor.compress(state, scheme)
    return tensors, Compressor.decompress(tensors, scheme)["weight"].T


# ---- bitsandbytes ----


@fixture(
    "bitsandbytes",
    ("b64", 128, 24, 64, False),
    ("b128", 256, 12, 128, False),
    # Over 256 blocks, so that there are two of their scales.
    ("nested_b64", 512, 33, 64, True),
    ("nested_b32", 64, 12, 32, True),
)
def nf4(k, n, block, nested):
    from bitsandbytes import functional

    weight = random_linear(k, n).weight.data
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type="nf4")
    tensors = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return tensors, functional.dequantize_4bit(packed, state).T


# ---- DeepSeek's fp8 blocks ----


@fixture("transformers", ("blocks", 128, 256))
def fp8(k, n):
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    tensors = Fp8Quantize(config).convert({"weight": random_linear(k, n).weight.data})
    return tensors, Fp8Dequantize(config).convert(tensors)["weight"].T


if __name__ == "__main__":
    for name in sys.argv[1:] or FIXTURES:
        write(name)
