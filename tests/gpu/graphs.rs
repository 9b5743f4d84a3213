//! CUDA graphs.
#![allow(unsafe_code)] // A stream that is captured.

use candle_core::{DType, Device, Result, Tensor, bail};
use cudarc::driver::sys;
use kaio_candle::prelude::*;

use super::say;
use super::streams::bits;
use super::suites::{Layout, Source};

/// An op in a graph: its leaves, which get new contents, and where its result is put.
struct Node {
    leaves: Vec<Tensor>,
    /// What the leaves are filled with, in turn.
    contents: Vec<Vec<Tensor>>,
    op: GraphOp,
    result: Tensor,
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
        Ok(Self { leaves, contents, op: Box::new(op), result })
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

/// Products and attention on candle's stream are captured, and replayed on other contents of the same memory.
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
    let nodes = [
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
    ];
    let eager = |turn: usize| {
        let results = nodes.iter().map(|node| {
            node.fill(turn)?;
            Ok(bits(&(node.op)(&node.leaves)?))
        });
        results.collect::<Result<Vec<_>>>()
    };
    let want = (0..CONTENTS).map(eager).collect::<Result<Vec<_>>>()?;

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
    // Also after a failure: the stream is of no use before.
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).map_err(failed);
    captured?;
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
            assert!(&bits(&node.result) == want, "result {i} of the graph, contents {turn}");
        }
    }
    drop(graph);
    assert!(eager(0)? == want[0], "after the graph");
    say(&format!("suite native graphs: {} ops captured, replayed 5 times", nodes.len()));
    Ok(())
}
