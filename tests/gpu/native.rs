//! `Engine::Native`: random products, many threads, repeated runs, CUDA graphs, launches of one's own.
#![allow(unsafe_code)] // Streams that are captured, kernels that are launched.

use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use cudarc::driver::sys;
use kaio_candle::launch::{Args, Function};
use kaio_candle::prelude::*;
use kaio_candle::ptx::{Kernel, Source as Text, Target};

use super::case::Case;
use super::common::{Layout, Source, Tally, poison};
use super::streams::bits;
use super::{custom_kernel, gpu, say, work};

/// `KAIO_RANDOM_CASES`, or as many as take about a minute.
fn random_cases() -> usize {
    std::env::var("KAIO_RANDOM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3000)
}

pub fn random(device: &Device, cases: usize) {
    candle_core::cuda::set_gemm_reduced_precision_f32(false);
    let mut tally = Tally::new("native matmul random", device);
    for i in 0..cases {
        let case = Case::random("random", i, 700, 700);
        tally.case(format!("{case:?}"), || case.check(device, &[Engine::Native]));
    }
    tally.finish();
}

#[test]
fn random_products() {
    if let Some(gpu) = gpu() {
        random(&gpu, random_cases());
    }
}

/// What the test of random products accepts: the CPU path, on cases of the same kind.
#[test]
fn random_products_on_the_cpu() {
    let mut tally = Tally::new("matmul random on the CPU", &Device::Cpu);
    for i in 0..60 {
        let case = Case::random("random", i, 90, 90);
        tally.case(format!("{case:?}"), || case.check(&Device::Cpu, &[Engine::Native]));
    }
    tally.finish();
}

/// Both engines keep to the same bound around the same sums.
#[test]
fn engines_agree() {
    let Some(gpu) = gpu() else { return };
    let mut tally = Tally::new("native and kaio-ops", &gpu);
    for i in 0..200 {
        let case = Case::random("engines", i, 300, 300);
        let engines = [Engine::Native, Engine::KaioOps, Engine::Auto];
        tally.case(format!("{case:?}"), || case.check(&gpu, &engines));
    }
    tally.finish();
}

/// The same bits on every run, wherever the allocator puts inputs and result.
#[test]
fn runs_are_identical() {
    let Some(gpu) = gpu() else { return };
    let mut tally = Tally::new("native run to run", &gpu);
    for work in work::products("repeated", 200, 500, 500).chain(work::attentions()) {
        tally.case(&work.name, || {
            let first = bits(&work.call(&gpu)?()?);
            for run in 1..5 {
                poison(&gpu, first.len() + run * 1000);
                let again = bits(&work.call(&gpu)?()?);
                if let Some(i) = first.iter().zip(&again).position(|(a, b)| a != b) {
                    bail!("element {i} differs in run {run}");
                }
            }
            Ok(())
        });
    }
    tally.finish();
}

/// A product of every kind of kernel, small: what `compute-sanitizer` and the emulator are run on. Nothing
/// else touches what they store.
///
/// ```sh
/// compute-sanitizer --tool racecheck target/release/deps/gpu-… native::every_kind
/// ```
#[test]
fn every_kind() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let plain = MatmulOptions::default();
    let full = plain.clone().activation(Activation::GeluErf).out_dtype(DType::BF16);
    let kinds: [(&str, [usize; 3], &MatmulOptions); 10] = [
        ("tiles stored by the copy engine, one for each block", [256, 512, 192], &plain),
        ("blocks that stay for several tiles", [2048, 2304, 64], &full),
        ("staged, ragged", [130, 131, 70], &full),
        ("one row of weights' products", [1, 512, 256], &plain),
        ("few rows, blocks that stay", [16, 20_000, 64], &full),
        ("few rows, the depth in two parts", [16, 1024, 4096], &full),
        ("one tile, the depth in many parts", [64, 64, 4096], &plain),
        ("few columns", [500, 7, 100], &plain),
        ("warpgroups that take turns", [3072, 3072, 192], &full),
        ("taking turns at the columns", [2560, 2568, 200], &plain),
    ];
    let mut tally = Tally::new("native kinds", &gpu);
    for ((kind, [m, n, k], opts), transposed) in
        kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)])
    {
        tally.case(format!("{kind}, transposed: {transposed}"), || {
            let mut source = Source::new(kind, &Device::Cpu);
            let layout = if transposed { Layout::Transposed } else { Layout::Plain };
            let a = source.tensor(DType::BF16, &[m, k], layout)?;
            let b = source.tensor(DType::BF16, &[k, n], layout)?;
            let bias = source.tensor(DType::F32, &[n], Layout::Plain);
            let opts = match opts.activation {
                None => opts.clone(),
                Some(_) => opts.clone().bias(bias?),
            };
            let want = a.kaio_matmul_with(&b, &opts)?.to_dtype(DType::F32)?;
            let mut opts = opts.engine(Engine::Native);
            opts.bias = opts.bias.map(|bias| bias.to_device(&gpu)).transpose()?;
            let got = a.to_device(&gpu)?.kaio_matmul_with(&b.to_device(&gpu)?, &opts)?;
            let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let worst = (got - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // A rounding to bf16 of sums of about √k.
            let bound = 0.02 * (k as f32).sqrt();
            match worst <= bound {
                true => Ok(()),
                false => bail!("differs by {worst}, more than {bound}"),
            }
        });
    }
    tally.finish();
    Ok(())
}

/// `launches` mixed calls from eight threads, each result compared with that of a single thread.
fn threads(device: &Device, what: &str, launches: usize) -> Result<()> {
    const THREADS: usize = 8;
    const AT_ONCE: usize = 25;
    let all: Vec<_> = work::products("threads", 60, 300, 200).chain(work::attentions()).collect();
    let alone = all.iter().map(|work| Ok(bits(&work.call(device)?()?)));
    let alone = alone.collect::<Result<Vec<_>>>()?;
    let done = AtomicUsize::new(0);
    let run = |thread: usize| -> Result<()> {
        // Each thread makes its own: candle's default stream is another one on each thread, and
        // nothing but the host orders them.
        let calls = all.iter().map(|work| work.call(device)).collect::<Result<Vec<_>>>()?;
        let mut order = Source::new(&format!("order {thread}"), device);
        for _ in 0..launches / THREADS / AT_ONCE {
            let chosen: Vec<_> =
                (0..AT_ONCE).map(|_| (order.bits() % calls.len() as u64) as usize).collect();
            let results = chosen.iter().map(|&i| calls[i]()).collect::<Result<Vec<_>>>()?;
            for (&i, result) in chosen.iter().zip(&results) {
                if bits(result) != alone[i] {
                    bail!("thread {thread}: {} differs", all[i].name);
                }
            }
            done.fetch_add(AT_ONCE, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|i| scope.spawn(move || run(i))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    let done = done.into_inner();
    say(&format!(
        "suite native threads: {done} launches of {} kinds of work from {THREADS} threads on {what}",
        all.len()
    ));
    assert_eq!(done, launches);
    Ok(())
}

#[test]
fn ten_thousand_launches_from_eight_threads() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    threads(&gpu, "a stream each", 10_000)?;
    threads(&Device::new_cuda_with_stream(0)?, "one stream", 2_000)
}

/// Several candle devices on one GPU, with streams of their own: each input is still being written
/// when the product is submitted, and its memory is used again as soon as it was.
#[test]
fn streams_of_several_devices_are_ordered() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let own = [Device::new_cuda_with_stream(0)?, Device::new_cuda_with_stream(0)?];
    let n = 1024;
    // A long way to a matrix, all of it on the device's stream: about a millisecond.
    let late = |device: &Device, seed: &str| {
        let mut x = Source::new(seed, device).tensor(DType::F32, &[n, n], Layout::Plain)?;
        for _ in 0..20 {
            x = (x.matmul(&x)? * (3.0 / (n as f64).sqrt()))?.tanh()?;
        }
        x.to_dtype(DType::F16)
    };
    let product = |devices: [&Device; 3]| {
        let (a, b) = (late(devices[0], "a")?, late(devices[1], "b")?);
        let bias = late(devices[2], "bias")?.get(7)?;
        let opts = MatmulOptions::default().bias(bias).engine(Engine::Native);
        let product = a.kaio_matmul_with(&b, &opts)?;
        drop((a, b, opts));
        // What was just freed is taken and overwritten.
        devices.iter().for_each(|device| poison(device, n * n / 2));
        Ok::<_, candle_core::Error>(bits(&product))
    };
    let want = product([&gpu; 3])?;
    let [first, second] = &own;
    for _ in 0..3 {
        for devices in [[&gpu, first, second], [first, second, &gpu], [first, &gpu, first]] {
            assert!(product(devices)? == want, "devices {devices:?}");
        }
    }
    Ok(())
}

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
pub fn graphs() -> Result<()> {
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

/// The example is compared with candle's ops.
#[test]
fn example_of_a_custom_kernel() -> Result<()> {
    gpu().map_or(Ok(()), |_| custom_kernel::main())
}

/// Views make sizes that no memory holds: refused before anything is allocated.
#[test]
fn sizes_over_the_kernels_limits() {
    let Some(gpu) = gpu() else { return };
    let view = |from: &[usize], to: &[usize]| {
        Tensor::zeros(from, DType::F16, &gpu).unwrap().broadcast_as(to).unwrap()
    };
    let b = view(&[8, 8], &[8, 8]);
    let opts = MatmulOptions::default().engine(Engine::Native);
    for (a, got) in [
        (view(&[1, 8], &[3_000_000_000, 8]), "M of 3000000000 (at most 2147483647)"),
        (
            view(&[1, 1, 8], &[40_000_000, 1, 8]),
            "a result of 40000000 tiles of 64 x 64 (at most 33554431)",
        ),
    ] {
        let b = if a.rank() == 3 { b.broadcast_left(40_000_000).unwrap() } else { b.clone() };
        assert_eq!(
            a.kaio_matmul_with(&b, &opts).unwrap_err().to_string(),
            format!(
                "kaio_matmul_with: Engine::Native cannot take {got}; split it and join the results \
                 with `Tensor::cat`"
            )
        );
    }
}

/// Queries and keys of more than 2³¹ elements: the last of a long sequence are the same as on their own,
/// and keys in two halves, joined by their log-sum-exp, as all of them.
#[test]
fn attention_over_two_to_the_31_elements() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let (dim, rows, times) = (128, 1 << 16, 257);
    let source = &mut Source::new("2^31 elements", &gpu);
    let short = source.tensor(DType::BF16, &[rows, dim], Layout::Plain)?;
    let long = short.repeat((times, 1))?;
    assert!(long.elem_count() > 1 << 31);
    let few = source.tensor(DType::BF16, &[70, dim], Layout::Plain)?;

    let opts = FlashAttnOptions::default().engine(Engine::Native);
    let (all, lse) = long.kaio_flash_attn_with_lse(&few, &few, &opts)?;
    let (part, part_lse) = short.kaio_flash_attn_with_lse(&few, &few, &opts)?;
    for turn in [0, times / 2, times - 1] {
        let same = bits(&all.narrow(0, turn * rows, rows)?.to_dtype(DType::F32)?)
            == bits(&part.to_dtype(DType::F32)?);
        assert!(same, "the results of queries from {} on", turn * rows);
        let same = bits(&lse.narrow(0, turn * rows, rows)?) == bits(&part_lse);
        assert!(same, "the log-sum-exp of queries from {} on", turn * rows);
    }
    drop((all, lse));

    let (out, lse) = few.kaio_flash_attn_with_lse(&long, &long, &opts)?;
    let (part, part_lse) = few.kaio_flash_attn_with_lse(&short, &short, &opts)?;
    // So often the same keys: the same result, and a sum so many times as large.
    let differs = |a: &Tensor, b: &Tensor| {
        (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.max_all()?.to_scalar::<f32>()
    };
    let grown = (lse - (times as f64).ln())?;
    let (out, lse) = (differs(&out, &part)?, differs(&grown, &part_lse)?);
    assert!(out < 4e-3 && lse < 1e-3, "differ by {out}, log-sum-exp by {lse}");
    Ok(())
}

fn cuda(device: &Device) -> &CudaDevice {
    device.as_cuda_device().expect("a GPU")
}

/// A kernel that does nothing with a pointer and a number.
fn idle(entry: &'static str, target: Target, cluster: u32) -> Text {
    let k = Kernel::new(entry, target, 32);
    k.cluster(cluster);
    k.pointer("at");
    k.param::<u32>("len");
    k.finish()
}

#[test]
fn wrong_launches() {
    let Some(gpu) = gpu() else { return };
    let device = cuda(&gpu);
    let function = Function::compile(device, &idle("idle", Target::Sm80, 1)).unwrap();
    let launch = |function: &Function, grid, args: &Args| {
        // SAFETY: the kernel touches no memory.
        unsafe { function.launch(device, grid, args) }.map_err(|e| e.to_string())
    };
    let mut args = Args::new();
    args.pointer(0).value(7u32);
    assert_eq!(launch(&function, [3, 2, 1], &args), Ok(()));
    assert_eq!(launch(&function, [0, 2, 1], &args), Ok(()), "no blocks are nothing to do");
    assert_eq!(
        launch(&function, [1, 1, 1], Args::new().pointer(0).value(7u64)).unwrap_err(),
        "Function::launch: `args` is 8, 8 bytes, wanted 8, 4 bytes, the parameters of `idle`; pass \
         the parameters in their order and types"
    );
    assert_eq!(
        launch(&function, [1, 65_536, 1], &args).unwrap_err(),
        "Function::launch: `grid` is [1, 65536, 1], wanted at most 2147483647 x 65535 x 65535 \
         blocks; let each block do more"
    );
    let mut many = Args::new();
    for i in 0..65u32 {
        many.value(i);
    }
    let text = launch(&function, [1, 1, 1], &many).unwrap_err();
    assert!(text.contains("`args` is more than 64 arguments or 4096 bytes"), "{text}");

    let hopper = idle("hopper", Target::Sm90a, 2);
    match Function::compile(device, &hopper) {
        Ok(pairs) => {
            assert_eq!(launch(&pairs, [4, 1, 1], &args), Ok(()));
            assert_eq!(
                launch(&pairs, [3, 1, 1], &args).unwrap_err(),
                "Function::launch: `grid` is [3, 1, 1], wanted a multiple of the 2 blocks of a \
                 cluster in x; round it up"
            );
        }
        Err(e) => {
            let text = e.to_string();
            assert!(text.contains("for sm_90a cannot run on a GPU of compute"), "{text}");
        }
    }
    gpu.synchronize().unwrap();
}

#[test]
fn kernels_that_do_not_compile() {
    let Some(gpu) = gpu() else { return };
    let refusal = |source: &Text| {
        let compile = || Function::compile(cuda(&gpu), source).unwrap_err().to_string();
        let text = compile();
        assert_eq!(compile(), text, "a failure leaves no trace");
        text
    };
    let broken = || {
        let k = Kernel::new("broken", Target::Sm80, 32);
        k.emit(format_args!("add.u32 %r0, %r1"));
        k.finish()
    };
    let text = refusal(&broken());
    assert!(text.starts_with("Function::compile: the GPU call failed: CUDA_ERROR_"), "{text}");
    assert!(text.contains(" for the kernel `broken`: "), "the assembler's words: {text}");

    let mut zero = broken();
    zero.text.push('\0');
    assert_eq!(
        refusal(&zero),
        "Function::compile: the GPU call failed: the text of `broken` has a zero byte"
    );
    let large = Kernel::new("large", Target::Sm80, 32);
    large.shared(1 << 30);
    let text = refusal(&large.finish());
    assert!(
        text.starts_with(
            "Function::compile: the kernel `large` cannot have 1073741824 bytes of shared memory a \
             block on this GPU (at most "
        ),
        "{text}"
    );
    // The context is as good as before.
    Function::compile(cuda(&gpu), &idle("after", Target::Sm80, 1)).unwrap();
}
