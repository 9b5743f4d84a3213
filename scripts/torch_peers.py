#!/usr/bin/env python3
"""PyTorch's times for the rows of the benches matmul, quant, attention, optimizer and training, as more peers:

    cargo bench --features cuda --bench matmul -- --list >rows.json
    python3 scripts/torch_peers.py rows.json >torch.json
    cargo bench --features cuda --bench matmul -- --torch torch.json

Attention is scaled_dot_product_attention on [B, H, S, D], with cuDNN and with FlashAttention; windows and packed
sequences, which it does not have, are that FlashAttention's own. A backward pass is torch.autograd.grad of the result,
which is there before, given a random upstream gradient.

Times are taken as the bench takes them (benches/common/gpu.rs says why): events around one call while the
GPU is kept busy until the call is enqueued, L2 flushed for the rows that say so, a rest after each call,
medians. Host rows are left out, and what PyTorch cannot do, which stderr says. `--quick` takes fewer samples.

How far results of attention are from the formula in f64, ours beside PyTorch's on the same inputs:

    cargo bench --features cuda --bench attention -- --accuracy results.safetensors
    python3 scripts/torch_peers.py --accuracy results.safetensors

and gradients, relative to the root mean square of those in f64, with ours over FlashAttention's:

    cargo bench --features cuda --bench attention -- --errors gradients.safetensors
    python3 scripts/torch_peers.py --errors gradients.safetensors
"""

import functools
import itertools
import json
import mmap
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
OTHERS = {"F64": torch.float64, "I64": torch.int64, "U8": torch.uint8}
CYCLES_PER_US = 2000
LONGEST_HEAD_START_US = 1600


class Gpu:
    def __init__(self):
        self.flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, run, cold, samples, warm_up=3):
        times, head_start = [], 50
        while len(times) < warm_up + samples:
            if cold:
                self.flush.zero_()
                self.flush.amax()  # leaves no dirty line
            torch.cuda._sleep(head_start * CYCLES_PER_US)
            self.start.record()
            run()
            self.end.record()
            late = self.start.query()
            self.end.synchronize()
            us = self.start.elapsed_time(self.end) * 1e3
            time.sleep(min(2 * us, 10_000) * 1e-6)
            if late and head_start < LONGEST_HEAD_START_US:
                head_start *= 2
            else:
                times.append(us)
        return statistics.median(times[warm_up:])


def matrix(rows, cols, dtype, transposed):
    if transposed:
        return torch.randn(cols, rows, device="cuda", dtype=dtype).t()
    return torch.randn(rows, cols, device="cuda", dtype=dtype)


def forward(row, q, k, v):
    """Who attends, by the peer's name."""
    grouped = row["heads"] != row["kv_heads"]

    def fused(backend):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=row["causal"], enable_gqa=grouped)

    def own(q, k, v, starts, causal, **window):
        lengths = (starts, starts, row["queries"], row["keys"])
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **window)[0]

    if row["lengths"] is not None:
        starts = torch.tensor([0, *itertools.accumulate(row["lengths"])], dtype=torch.int32, device="cuda")
        return {"FlashAttention": lambda: own(q, k, v, starts, row["causal"])}
    if row["window"] is not None:
        sizes = {"window_size_left": row["window"], "window_size_right": 0}
        return {"FlashAttention": lambda: own(*(t.transpose(1, 2) for t in (q, k, v)), None, False, **sizes)}
    return {name: lambda backend=backend: fused(backend) for name, backend in BACKENDS.items()}


def attention(row):
    if row["deterministic"]:
        return {}  # its peer is our own default
    forward_alone = row["pass"] == "forward"

    def operand(heads, length):
        tokens = [row["batch"], row[heads], row[length]]
        if row["lengths"] is not None:
            tokens = [sum(row["lengths"]), row[heads]]
        like = {"device": "cuda", "dtype": DTYPES[row["dtype"]], "requires_grad": not forward_alone}
        return torch.randn(*tokens, row["dim"], **like)

    inputs = [operand("heads", "queries"), operand("kv_heads", "keys"), operand("kv_heads", "keys")]

    def gradients(attend):
        @functools.cache
        def ready():
            out = attend()
            return out, torch.randn_like(out)

        def run():
            out, upstream = ready()
            if row["pass"] == "both":
                out = attend()
            torch.autograd.grad(out, inputs, upstream, retain_graph=row["pass"] == "backward")

        return run

    passes = forward(row, *inputs)
    return passes if forward_alone else {name: gradients(attend) for name, attend in passes.items()}


def calls(row):
    """What to time, by the peer's name."""
    if row["op"] == "quant":
        return quantised(row)
    if row["op"] == "training":
        return training(row)
    if row["op"] == "host":
        return {}
    if row["op"] == "optimizer":
        return optimizer(row)
    if row["op"] == "attention":
        return attention(row)
    dtype, out = DTYPES[row["dtype"]], DTYPES[row["out"]]
    m, n, k = row["m"], row["n"], row["k"]
    a = matrix(m, k, dtype, row["layout"][0] == "t")
    b = matrix(k, n, dtype, row["layout"][1] == "t")
    if row["op"] == "matmul":
        wider = {} if out == dtype else {"out_dtype": out}
        return {"torch": lambda: torch.mm(a, b, **wider)}
    if row["op"] == "forward+backward" and out == dtype:
        a.requires_grad_()
        b.requires_grad_()
        upstream = torch.randn(m, n, device="cuda", dtype=dtype)
        return {"torch": lambda: torch.autograd.grad(torch.mm(a, b), (a, b), upstream)}
    return {}


def quantised(row):
    """Of products: torch.mm of a weight in 16 bits, and the int4 kernel where its scheme is the row's."""
    if row["of"] == "codes":
        return codes(row)
    if row["of"] != "product":
        return {}
    m, n, k, group = row["m"], row["n"], row["k"], row["int4_group"]
    like = {"device": "cuda", "dtype": DTYPES[row["dtype"]]}
    x, weight = torch.randn(m, k, **like), torch.randn(k, n, **like)

    @functools.cache
    def packed():
        pairs = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        scales_and_zeros = torch.rand(k // group, n, 2, **like)
        return torch.ops.aten._convert_weight_to_int4pack(pairs, 8), group, scales_and_zeros

    peers = {"torch": lambda: torch.mm(x, weight)}
    # It always has zero points.
    if row["dtype"] == "bf16" and group in (32, 64, 128):
        peers["tinygemm"] = lambda: torch.ops.aten._weight_int4pack_mm(x, *packed())
    return peers


def codes(row):
    """int8 without scales, to i32; e4m3 with those of rows and columns, without its fast sums. Weights lie along K."""
    m, n, k = row["m"], row["n"], row["k"]
    if row["weight"].startswith("int8"):
        a, b = (torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (m, n))
        return {"torch": lambda: torch._int_mm(a, b.t())}
    a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n))
    of_a, of_b = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
    return {"torch": lambda: torch._scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b, out_dtype=torch.bfloat16)}


def optimizer(row):
    """Fused AdamW and clip_grad_norm_, as PyTorch has them: 16-bit weights have moments in 16 bits, and no f32 copy."""
    if row["codes"] or row["of"] in ("host", "accumulate"):
        return {}
    weights = [torch.randn(shape, device="cuda", dtype=DTYPES[row["dtype"]]) for shape in row["shapes"]]
    for weight in weights:
        weight.requires_grad_()
        weight.grad = torch.randn_like(weight) * 1e-3
    adam = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, fused=True)

    def clip():
        torch.nn.utils.clip_grad_norm_(weights, 1.0)

    def clipped_step():
        clip()
        adam.step()

    return {"torch": {"adamw": adam.step, "adamw, clipped": clipped_step, "clip": clip}[row["of"]]}


def table_ids(row, scattered):
    """Those of benches/training/table.rs: of each as many, or id k in proportion to 1/(k + 1)."""
    if row["of"].endswith("uniform"):
        return scattered % row["classes"]
    sums = (1 / torch.arange(1, row["classes"] + 1, device="cuda", dtype=torch.float64)).cumsum(0)
    return torch.searchsorted(sums, (scattered % row["rows"] + 0.5) / row["rows"] * sums[-1])


def training(row):
    """The function as it stands, and compiled; backward: its gradients alone."""
    rows, cols, like = row["rows"], row["cols"], {"device": "cuda", "dtype": DTYPES[row["dtype"]]}
    matrix, depth = [rows, cols], row["depth"] or 0
    vector, F = [cols], torch.nn.functional
    heads = [1, 32, rows // 32, cols]
    cos, sin = (torch.randn(rows // 32, cols // 2, **like) for _ in range(2)) if "rope" in row["of"] else (None, None)
    scattered = torch.arange(rows, device="cuda") * 2_654_435_761
    targets = scattered % cols
    if row["of"].startswith("embedding"):
        ids, vector = table_ids(row, scattered), [row["classes"], cols]

    def halves(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def interleaved(x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    shapes, function = {
        "rms_norm": ([matrix, vector], lambda x, weight: F.rms_norm(x, (cols,), weight, 1e-5)),
        "layer_norm": ([matrix, vector, vector], lambda x, w, bias: F.layer_norm(x, (cols,), w, bias, 1e-5)),
        "rope halves": ([heads], halves),
        "rope interleaved": ([heads], interleaved),
        "softmax": ([matrix], lambda x: torch.softmax(x, dim=-1)),
        "cross_entropy": ([matrix], lambda logits: F.cross_entropy(logits, targets)),
        "linear_cross_entropy": (
            [[rows, depth], [cols, depth]],
            lambda hidden, weight: F.cross_entropy(hidden @ weight.t(), targets),
        ),
        "embedding uniform": ([vector], lambda table: F.embedding(ids, table)),
        "embedding zipf": ([vector], lambda table: F.embedding(ids, table)),
        "swiglu": ([matrix, matrix], lambda gate, up: F.silu(gate) * up),
    }[row["of"]]
    backward, both = row["pass"] != "forward", row["pass"] == "both"
    inputs = [torch.randn(*dims, requires_grad=backward, **like) for dims in shapes]

    def timed(function):
        if not backward:
            return lambda: function(*inputs)
        if both:
            return lambda: torch.autograd.grad(function(*inputs), inputs)

        @functools.cache
        def ready():
            out = function(*inputs)
            return out, torch.randn_like(out)

        def run():
            out, upstream = ready()
            torch.autograd.grad(out, inputs, upstream, retain_graph=True)

        return run

    return {"torch": timed(function), "compiled": timed(torch.compile(function))}


def read_safetensors(path, device="cuda"):
    """The format: https://huggingface.co/docs/safetensors, eight bytes of length, JSON, the tensors' bytes."""
    dtypes = {**{name.upper(): dtype for name, dtype in DTYPES.items()}, **OTHERS}
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            dtype, shape, offset = dtypes[entry["dtype"]], entry["shape"], begin + entry["data_offsets"][0]
            count = torch.Size(shape).numel()
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape).to(device)
    return tensors


def accuracy(path):
    tensors = read_safetensors(path)
    print("root mean square and largest difference from f64, in units of 1e-6")
    for case in sorted({name.rsplit("/", 1)[0] for name in tensors}):
        q, k, v, ours = (tensors[f"{case}/{part}"] for part in ("q", "k", "v", "out"))
        causal = case.endswith("causal")
        with sdpa_kernel(SDPBackend.MATH):
            exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        results = {"kaio-candle": ours}
        for name, backend in {**BACKENDS, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}.items():
            try:
                with sdpa_kernel(backend):
                    results[name] = scaled_dot_product_attention(q, k, v, is_causal=causal)
            except RuntimeError:
                pass
        errors = {name: (result.double() - exact).abs() for name, result in results.items()}
        cells = (f"{n} {e.square().mean().sqrt() * 1e6:.4g}, {e.max() * 1e6:.4g}" for n, e in errors.items())
        print(f"{case}: {'; '.join(cells)}")


def errors(path):
    tensors, worst = read_safetensors(path), [0.0, 0.0]
    print("errors from f64 over its root mean square, in units of 1e-6: root mean square, largest")
    for case in sorted({name.split("/")[0] for name in tensors}):
        *inputs, upstream = (tensors[f"{case}/{part}"] for part in ("q", "k", "v", "grad"))
        like = {"is_causal": case.endswith("causal"), "enable_gqa": inputs[0].shape[1] != inputs[1].shape[1]}

        def gradients(backend, dtype):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*leaves, **like)
            return torch.autograd.grad(out, leaves, upstream.to(dtype))

        exact = gradients(SDPBackend.MATH, torch.float64)
        ours = ("default", "deterministic")
        results = {who: [tensors[f"{case}/{who}/{of}"] for of in ("dq", "dk", "dv")] for who in ours}
        for name, backend in BACKENDS.items():
            try:
                results[name] = gradients(backend, inputs[0].dtype)
            except RuntimeError as error:
                print(f"{case}: no {name}: {error}", file=sys.stderr)
        for i, of in enumerate(("dq", "dk", "dv")):
            size = exact[i].square().mean().sqrt()
            far = {name: (result[i].double() - exact[i]).abs() / size for name, result in results.items()}
            far = {name: (e.square().mean().sqrt().item(), e.max().item()) for name, e in far.items()}
            cells = [f"{name} {rms * 1e6:.0f}, {largest * 1e6:.0f}" for name, (rms, largest) in far.items()]
            if "FlashAttention" in far:
                for who in ours:
                    ratios = [a / b for a, b in zip(far[who], far["FlashAttention"])]
                    worst = [max(pair) for pair in zip(worst, ratios)]
                    cells.append(f"{who} / FlashAttention {ratios[0]:.3f}, {ratios[1]:.3f}")
            print(f"{case}, {of}: {'; '.join(cells)}")
    print(f"the worst of ours / FlashAttention: {worst[0]:.3f}, {worst[1]:.3f}")


def main():
    if "--accuracy" in sys.argv:
        return accuracy(sys.argv[-1])
    if "--errors" in sys.argv:
        return errors(sys.argv[-1])
    paths = [arg for arg in sys.argv[1:] if arg != "--quick"]
    samples = 10 if "--quick" in sys.argv else 30
    if len(paths) != 1:
        sys.exit(__doc__)
    with open(paths[0], encoding="utf-8") as file:
        rows = json.load(file)
    gpu, times = Gpu(), {}
    for row in rows:
        for name, run in calls(row).items():
            try:
                times.setdefault(row["id"], {})[name] = gpu.time(run, row["cold"], samples)
            except (RuntimeError, TypeError) as error:  # TypeError: no `out_dtype` before 2.8
                print(f"{row['id']}: no {name}: {error}", file=sys.stderr)
    peer = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    json.dump({"peer": peer, "us": times}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
