//! CUDA graphs.
#![allow(unsafe_code)] // A stream that is captured.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use cudarc::driver::sys;
use kaio_candle::Error;
use kaio_candle::prelude::*;
use kaio_candle::tune::FlashAttnBackward;

use super::say;
use super::streams::bits;
use super::suites::{Layout, Source};
use super::work::end_to_end;

/// An op in a graph: its leaves, which get new contents, and where its result is put.
struct Node {
    leaves: Vec<Tensor>,
    /// What the leaves are filled with, in turn.
    contents: Vec<Vec<Tensor>>,
    op: GraphOp,
    result: Tensor,
    /// How far a replay may be from another run, of the largest element: sums of atomic additions differ.
    apart: f32,
}

type GraphOp = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

const CONTENTS: usize = 3;

impl Node {
    fn new(
        device: &Device,
        name: &str,
        bases: &[&[usize]],
        op: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
    ) -> Result<Self> {
        let source = &mut Source::new(name, device);
        let mut tensors =
            || bases.iter().map(|base| source.tensor(DType::BF16, base, Layout::Plain)).collect();
        let leaves: Vec<Tensor> = tensors()?;
        let contents = (0..CONTENTS).map(|_| tensors()).collect::<Result<_>>()?;
        let result = op(&leaves)?;
        Ok(Self { leaves, contents, op: Box::new(op), result, apart: 0.0 })
    }

    /// Forward and backward pass of attention over `[B, H, S, D]`: the gradients.
    fn gradients(
        device: &Device,
        name: &str,
        [heads, kv_heads, rows, keys, dim]: [usize; 5],
        opts: FlashAttnOptions,
    ) -> Result<Self> {
        let (q, k) = ([2, heads, rows, dim], [2, kv_heads, keys, dim]);
        let apart = if opts.deterministic { 0.0 } else { 1.0 / 64.0 };
        let node = Self::new(device, name, &[&q, &k, &k, &q], move |t| {
            let var = |i: usize| Ok::<_, candle_core::Error>(Var::from_tensor(&t[i])?.into_inner());
            let gradients =
                FlashAttnBackward::new([&var(0)?, &var(1)?, &var(2)?], &opts)?.run(&t[3])?;
            end_to_end(&gradients.into_iter().flatten().collect::<Vec<_>>())
        })?;
        Ok(Self { apart, ..node })
    }

    /// Whether the result is that of a run before.
    fn agrees(&self, want: &[u32]) -> bool {
        let got = bits(&self.result);
        let [got, want] =
            [&got[..], want].map(|bits| bits.iter().map(|&bits| f32::from_bits(bits)));
        let largest = want.clone().fold(0f32, |largest, x| largest.max(x.abs()));
        got.zip(want).all(|(a, b)| match self.apart {
            0.0 => a.to_bits() == b.to_bits(),
            apart => (a - b).abs() <= apart * largest,
        })
    }

    fn fill(&self, turn: usize) -> Result<()> {
        let pairs = self.leaves.iter().zip(&self.contents[turn]);
        pairs.into_iter().try_for_each(|(leaf, content)| leaf.slice_set(content, 0, 0))
    }

    /// The result's own memory is given back within the graph.
    fn run(&self) -> Result<()> {
        self.result.slice_set(&(self.op)(&self.leaves)?, 0, 0)
    }
}

/// Products and attention, forward and backward, on candle's stream are captured, and replayed on other contents of the same memory.
///
/// In a process of its own: nobody may wait for the whole context during a capture, as new streams do.
pub fn capture_and_replay() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;
    let cuda = device.as_cuda_device()?;
    // An event that was recorded before the capture cannot be waited for within it.
    // SAFETY: one thread uses one stream here.
    unsafe { cuda.disable_event_tracking() };

    let with = |dtype: DType| MatmulOptions::default().out_dtype(dtype).engine(Engine::Native);
    let (bf16, f32) = (with(DType::BF16), with(DType::F32));
    let plain = |opts: &MatmulOptions| {
        let opts = opts.clone();
        move |t: &[Tensor]| t[0].kaio_matmul_with(&t[1], &opts)
    };
    let causal = FlashAttnOptions::default().causal(true).engine(Engine::Native);
    let attend = |opts: &FlashAttnOptions| {
        let opts = opts.clone();
        move |t: &[Tensor]| t[0].kaio_flash_attn_with(&t[1], &t[2], &opts)
    };
    let backward =
        |deterministic| FlashAttnOptions::default().causal(true).deterministic(deterministic);
    let quantized = |scheme: QuantScheme, activations: Activations| {
        let mut source = Source::new(&format!("{scheme:?}"), &Device::Cpu);
        let w = source.tensor(DType::F32, &[256, 136], Layout::Plain)?;
        let w = QuantWeight::quantize(&w, &scheme)?.to_device(&device)?;
        let opts = MatmulOptions::default().activations(activations);
        Ok::<_, candle_core::Error>(move |t: &[Tensor]| t[0].kaio_matmul_quant_with(&w, &opts))
    };
    let int4 = QuantScheme::Int4 { group: 64, zero_points: true };
    let nf4 = QuantScheme::Nf4 { block: 64 };
    let int8 = QuantScheme::Int8 { per: Per::Channel };
    let nodes = [
        Node::new(&device, "int4, a row", &[&[1, 256]], quantized(int4, Activations::Float)?)?,
        Node::new(&device, "int4, tiles", &[&[70, 256]], quantized(int4, Activations::Float)?)?,
        Node::new(&device, "nf4, many rows", &[&[300, 256]], quantized(nf4, Activations::Float)?)?,
        Node::new(&device, "int8 weights", &[&[40, 256]], quantized(int8, Activations::Float)?)?,
        Node::new(&device, "rounded rows", &[&[40, 256]], quantized(int8, Activations::Int8)?)?,
        Node::new(&device, "a gradient", &[&[70, 256], &[70, 136]], {
            let multiply = quantized(int4, Activations::Float)?;
            move |t| {
                let x = Var::from_tensor(&t[0])?;
                let out = multiply(&[x.as_tensor().clone()])?;
                let grads = (out * &t[1])?.sum_all()?.backward()?;
                grads.get(&x).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"))
            }
        })?,
        Node::new(&device, "stored by TMA", &[&[256, 192], &[192, 256]], plain(&bf16))?,
        Node::new(&device, "many tiles", &[&[1000, 512], &[512, 1536]], plain(&bf16))?,
        Node::new(&device, "odd columns", &[&[100, 72], &[72, 77]], plain(&f32))?,
        Node::new(&device, "one row", &[&[1, 1024], &[1024, 2048]], plain(&bf16))?,
        Node::new(&device, "batched", &[&[6, 70, 64], &[6, 64, 80]], plain(&f32))?,
        Node::new(&device, "transposed", &[&[192, 256], &[136, 192]], {
            let opts = bf16.clone();
            move |t| t[0].t()?.kaio_matmul_with(&t[1].t()?, &opts)
        })?,
        Node::new(&device, "after the sum", &[&[65, 128], &[128, 200], &[200]], {
            let opts = bf16.clone().activation(Activation::Silu);
            move |t| t[0].kaio_matmul_with(&t[1], &opts.clone().bias(t[2].clone()))
        })?,
        Node::new(&device, "padded copies", &[&[33, 77], &[77, 40]], plain(&f32))?,
        Node::new(&device, "a strided copy", &[&[64, 96, 2], &[96, 64]], {
            let opts = f32.clone();
            move |t| t[0].narrow(2, 1, 1)?.squeeze(2)?.kaio_matmul_with(&t[1], &opts)
        })?,
        Node::new(&device, "attention", &[[2, 4, 200, 64].as_slice(); 3], attend(&causal))?,
        Node::new(
            &device,
            "keys in parts",
            &[&[1, 8, 1, 128], &[1, 2, 3000, 128], &[1, 2, 3000, 128]],
            attend(&causal),
        )?,
        Node::new(&device, "one view of three", &[&[2, 100, 3, 4, 64]], {
            let opts = causal.clone().layout(AttnLayout::Bshd);
            move |t| {
                let part = |i: usize| t[0].narrow(2, i, 1)?.squeeze(2);
                part(0)?.kaio_flash_attn_with(&part(1)?, &part(2)?, &opts)
            }
        })?,
        Node::new(
            &device,
            "a biased attention",
            &[&[2, 150, 96], &[2, 170, 96], &[2, 170, 96], &[150, 170]],
            {
                let opts = causal.clone().window_size_left(60);
                move |t| t[0].kaio_flash_attn_with(&t[1], &t[2], &opts.clone().bias(t[3].clone()))
            },
        )?,
        Node::gradients(&device, "backward", [4, 4, 300, 300, 128], backward(false))?,
        Node::gradients(&device, "of grouped heads", [4, 2, 200, 300, 64], backward(false))?,
        Node::gradients(&device, "of the widest", [2, 2, 150, 300, 256], backward(false))?,
        Node::gradients(&device, "deterministic", [4, 2, 300, 300, 128], backward(true))?,
        Node::gradients(&device, "the same, narrow", [4, 4, 200, 400, 64], backward(true))?,
    ];
    let eager = |turn: usize| {
        let results = nodes.iter().map(|node| {
            node.fill(turn)?;
            Ok(bits(&(node.op)(&node.leaves)?))
        });
        results.collect::<Result<Vec<_>>>()
    };
    let want = (0..CONTENTS).map(eager).collect::<Result<Vec<_>>>()?;

    let unprepared = Tensor::ones((256, 8), DType::F32, &Device::Cpu)?;
    let unprepared = QuantWeight::quantize(&unprepared, &int4)?.to_device(&device)?;

    // candle uploads the strides of what it copies; this keeps them, as none is uploaded in a capture.
    let _strides = cuda.enable_cuda_graph_htod_cache();
    let run = || nodes.iter().try_for_each(Node::run);
    run()?; // Compiles candle's kernels and keeps the strides.
    device.synchronize()?;
    let stream = cuda.cuda_stream();
    let failed = |e: cudarc::driver::DriverError| candle_core::Error::msg(e.to_string());
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    stream.begin_capture(mode).map_err(failed)?;
    let captured = run();
    let refused = nodes[0].leaves[0].kaio_matmul_quant(&unprepared);
    // Also after a failure: the stream is of no use before.
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).map_err(failed);
    captured?;
    let refused = refused.unwrap_err();
    assert!(matches!(Error::of(&refused), Some(Error::Unsupported { .. })), "{refused}");
    assert!(refused.to_string().contains("QuantWeight::prepare"), "{refused}");
    let Some(graph) = graph? else { bail!("nothing was captured") };

    let nan = |node: &Node| node.result.zeros_like()?.affine(0.0, f64::NAN);
    let poisons = nodes.iter().map(nan).collect::<Result<Vec<_>>>()?;
    for turn in [1, 0, 2, 2, 1] {
        for (node, poison) in nodes.iter().zip(&poisons) {
            node.fill(turn)?;
            node.result.slice_set(poison, 0, 0)?;
        }
        graph.launch().map_err(failed)?;
        for (i, (node, want)) in nodes.iter().zip(&want[turn]).enumerate() {
            assert!(node.agrees(want), "result {i} of the graph, contents {turn}");
        }
    }
    drop(graph);
    run()?; // Of the last contents.
    // What was refused has lost nothing.
    nodes[0].leaves[0].kaio_matmul_quant(&unprepared)?;
    for (i, (node, want)) in nodes.iter().zip(&want[1]).enumerate() {
        assert!(node.agrees(want), "result {i} after the graph");
    }
    say(&format!("suite native graphs: {} ops captured, replayed 5 times", nodes.len()));
    Ok(())
}
