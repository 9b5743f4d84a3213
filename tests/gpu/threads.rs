//! Many threads, each on the stream that candle gives it or on one for all.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Result, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::quant;

use super::streams::bits;
use super::suites::{Layout, Source};
use super::{gpu, say, work};

#[test]
fn many_threads() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let work = |device: &Device, seed: usize| -> Result<Vec<Vec<u32>>> {
        let mut source = Source::new(&format!("thread {seed}"), device);
        let a = source.tensor(DType::F16, &[33 + seed, 256], Layout::Plain)?;
        let w = source.tensor(DType::F32, &[256, 40], Layout::Plain)?;
        let (packed, scales) = quant::quantize_int4(&w)?;
        let (w8, scale) = quant::quantize_int8(&w)?;
        let (q, _, _) = a.kaio_qkv_project_int8([&w8, &w8, &w8], [scale; 3])?;
        let x = Var::from_tensor(&source.tensor(DType::F32, &[2, 70, 32], Layout::Plain)?)?;
        let grads = x.kaio_flash_attn(&x, &x, true)?.sqr()?.sum_all()?.backward()?;
        Ok(vec![
            bits(&a.kaio_matmul_tc(&w.to_dtype(DType::F16)?)?),
            bits(&a.kaio_matmul_int4(&packed, &scales)?),
            bits(&q),
            bits(grads.get(&x).unwrap()),
        ])
    };
    let alone: Vec<_> = (0..8).map(|seed| work(&gpu, seed)).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        for (seed, alone) in alone.iter().enumerate() {
            let gpu = &gpu;
            scope.spawn(move || {
                // A device of the thread's own in every second thread.
                let own = Device::new_cuda_with_stream(0).unwrap();
                let device = if seed % 2 == 0 { gpu } else { &own };
                for _ in 0..20 {
                    assert!(&work(device, seed).unwrap() == alone, "thread {seed} differs");
                }
            });
        }
    });
    Ok(())
}

/// Kernels that are launched as one graph, of which there is one for each thread's stream, and one after the other: more threads
/// than there are graphs kept, and other rows in each.
#[test]
fn threads_come_and_go() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let mut source = Source::new("threads come and go", &Device::Cpu);
    let w = source.tensor(DType::F32, &[256, 40], Layout::Plain)?;
    let w = QuantWeight::quantize(&w, &QuantScheme::Int8 { per: Per::Channel })?.to_device(&gpu)?;
    let opts = MatmulOptions::default().activations(Activations::Int8);
    let x = source.tensor(DType::F16, &[100, 256], Layout::Plain)?.to_device(&gpu)?;
    let want = bits(&x.kaio_matmul_quant_with(&w, &opts)?);
    for rows in 1..=100 {
        let product = || -> Result<_> { x.narrow(0, 0, rows)?.kaio_matmul_quant_with(&w, &opts) };
        let run = || {
            let twice = [product().unwrap(), product().unwrap()];
            gpu.synchronize().unwrap();
            twice.map(|out| bits(&out))
        };
        let got = std::thread::scope(|scope| scope.spawn(run).join().unwrap());
        assert!(
            got.iter().all(|got| want.starts_with(got)),
            "{rows} rows in a thread of their own"
        );
    }
    Ok(())
}

/// The first products with a weight, of many threads at once: one prepares it, all multiply with what it made.
#[test]
fn threads_race_for_a_weight() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    const THREADS: usize = 8;
    let schemes = [
        QuantScheme::Int4 { group: 64, zero_points: true },
        QuantScheme::Nf4 { block: 64 },
        QuantScheme::Int8 { per: Per::Channel },
    ];
    for scheme in schemes {
        let mut source = Source::new(&format!("{scheme:?}"), &Device::Cpu);
        let w = source.tensor(DType::F32, &[512, 200], Layout::Plain)?;
        let host = QuantWeight::quantize(&w, &scheme)?;
        let x = source.tensor(DType::BF16, &[5, 512], Layout::Plain)?.to_device(&gpu)?;
        let alone = bits(&x.kaio_matmul_quant(&host.to_device(&gpu)?)?);
        for _ in 0..10 {
            let weight = host.to_device(&gpu)?;
            gpu.synchronize()?;
            let (start, weight, x, alone) = (Barrier::new(THREADS), &weight, &x, &alone);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        start.wait();
                        let got = bits(&x.kaio_matmul_quant(weight).unwrap());
                        assert!(got == *alone, "{scheme:?} differs");
                        // Blocks of codes have 64 columns: 256 for these 200.
                        assert!(weight.bytes() * 200 <= host.bytes() * 256);
                    });
                }
            });
        }
    }
    Ok(())
}

/// `launches` mixed calls from eight threads, each result compared with that of a single thread.
fn threads(device: &Device, what: &str, launches: usize) -> Result<()> {
    const THREADS: usize = 8;
    const AT_ONCE: usize = 25;
    let attentions = work::attentions().chain(work::gradients());
    let all: Vec<_> = work::products("threads", 60, 300, 200).chain(attentions).collect();
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
