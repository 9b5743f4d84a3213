//! What is kept in memory: attention needs O(S·D), forward and backward, and a checkpoint its inputs and results. A binary of its
//! own, whose tests take turns: memory is the process's.
#![cfg(target_os = "linux")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device::Cpu, Result, Tensor, Var};
use kaio_candle::{prelude::*, train};

static TURN: Mutex<()> = Mutex::new(());

/// `VmHWM` (the peak) or `VmRSS` (now) in MB.
fn memory(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("Linux has it");
    let kb: f64 =
        line.trim_start_matches(':').trim_end_matches("kB").trim().parse().expect("a number");
    kb / 1024.0
}

/// Alone from here on, and with a new peak.
fn turn() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux has it");
    turn
}

#[test]
fn attention_over_8192_keys() -> Result<()> {
    let _turn = turn();
    let var = || Var::rand(-1f32, 1.0, (1, 1, 8192, 64), &Cpu);
    let (q, k, v) = (var()?, var()?, var()?);
    // Of every option, at the width of a row.
    let slopes = Tensor::new(&[0.01f32], &Cpu)?;
    let bias = Var::zeros((1, 1, 1, 8192), DType::F32, &Cpu)?;
    let lengths = Tensor::new(&[8000u32], &Cpu)?;
    let opts = FlashAttnOptions::default().causal(true).window_size_left(6000).softcap(20.);
    let opts = opts.alibi_slopes(slopes).bias(bias.as_tensor().clone()).seqlens_q(lengths);
    let before = memory("VmRSS");
    let plain = q.kaio_flash_attn(&k, &v, true)?;
    let out = q.kaio_flash_attn_with(&k, &v, &opts)?;
    let forward = memory("VmHWM") - before;
    let grads = (plain + out)?.sum_all()?.backward()?;
    let both = memory("VmHWM") - before;
    println!(
        "8192 keys: {forward:.0} MB for the forward pass, {both:.0} MB with the backward pass"
    );
    assert!(grads.get(&k).is_some() && grads.get(&bias).is_some());
    // The scores alone would be 256 MB.
    assert!(both < 200.0, "{both:.0} MB");
    Ok(())
}

/// Ops that need no input and no result of theirs for a gradient, and others, of which the last pass frees what they kept.
#[test]
fn blocks_keep_what_gradients_read() -> Result<()> {
    let _turn = turn();
    const MB: f64 = 33.0;
    const STEPS: usize = 8;
    let x = Var::ones((2048, 4224), DType::F32, &Cpu)?;
    let angles = [(); 2].map(|()| Tensor::ones((2048, 2112), DType::F32, &Cpu));
    let [cos, sin] = angles;
    let (cos, sin) = (cos?, sin?);
    let frozen = Tensor::eye(4, DType::BF16, &Cpu)?;
    let rope = |x: Tensor| x.kaio_rope(&cos, &sin, RopeLayout::Halves);
    let product = |x: Tensor| {
        let opts = MatmulOptions::default().compute_dtype(DType::BF16);
        x.reshape(((), 4))?.kaio_matmul_with(&frozen, &opts)?.reshape(x.shape())
    };
    let steps = |step: &dyn Fn(Tensor) -> Result<Tensor>| {
        let before = memory("VmRSS");
        let all = |_: &[Tensor]| (0..STEPS).try_fold(x.as_tensor().clone(), |x, _| step(x));
        Ok::<_, candle_core::Error>((train::block(all, &[])?.sum_all()?, before))
    };
    let sum = |x: Tensor| x.kaio_add(&x);
    let unread =
        [("rope", &rope as &dyn Fn(_) -> _), ("a frozen weight", &product), ("a sum", &sum)];
    for (name, step) in unread {
        let (loss, before) = steps(step)?;
        let kept = memory("VmRSS") - before;
        println!("{name}: kept {kept:.0} MB");
        // What candle's sum reads.
        assert!(kept < 2.0 * MB, "{name}: {kept:.0} MB");
        assert!(loss.backward()?.get(&x).is_some());
    }
    let (loss, before) = steps(&|x| x.kaio_swiglu(&x))?;
    let kept = memory("VmRSS") - before;
    let first = loss.backward()?;
    let after = memory("VmRSS") - before;
    drop(first);
    let last = train::backward(&loss)?;
    let after_last = memory("VmRSS") - before;
    println!(
        "swiglu: kept {kept:.0} MB; after a pass {after:.0} MB, after the last {after_last:.0} MB"
    );
    // Besides the gradient of `x`, what candle's sum reads.
    assert!(kept > 7.0 * MB && after > 8.0 * MB && after_last < 3.0 * MB);
    assert!(last.get(&x).is_some());
    Ok(())
}

/// A model in one block whose layers of eight steps are checkpointed blocks: in its backward pass there is at a time what one layer
/// keeps.
#[test]
fn one_layer_at_a_time() -> Result<()> {
    let _turn = turn();
    const MB: f64 = 33.0;
    const LAYERS: usize = 4;
    let x = Var::ones((2048, 4224), DType::F32, &Cpu)?;
    let layer = |x: &Tensor| (0..8).try_fold(x.clone(), |x, _| x.kaio_swiglu(&x));
    let recomputed =
        |x: &Tensor| train::checkpoint(move |x| train::block(|x| layer(&x[0]), &[&x[0]]), &[x]);
    let peak = |layer: &dyn Fn(&Tensor) -> Result<Tensor>| {
        std::fs::write("/proc/self/clear_refs", "5").expect("Linux has it");
        let before = memory("VmRSS");
        let all = |_: &[Tensor]| (0..LAYERS).try_fold(x.as_tensor().clone(), |x, _| layer(&x));
        let loss = train::block(all, &[])?.sum_all()?;
        assert!(train::backward(&loss)?.get(&x).is_some());
        Ok::<_, candle_core::Error>(memory("VmHWM") - before)
    };
    let (plain, one_by_one) = (peak(&layer)?, peak(&recomputed)?);
    println!("at most {plain:.0} MB, {one_by_one:.0} MB layer by layer");
    // Eight tensors of each of four layers; of one, besides what goes into each, and a few copies and gradients.
    assert!(plain > 32.0 * MB && one_by_one < (LAYERS + 8 + 8) as f64 * MB);
    Ok(())
}

/// Three segments of eight steps, on tensors of 33 MB, which the allocator gives back.
#[test]
fn checkpoints_keep_inputs_and_results() -> Result<()> {
    let _turn = turn();
    const MB: f64 = 33.0;
    let x = Var::zeros((2048, 4224), DType::F32, &Cpu)?;
    let segment = |x: &Tensor| (0..8).try_fold(x.clone(), |x, _| x.sin());
    let before = memory("VmRSS");
    let plain = (0..3).try_fold(x.as_tensor().clone(), |x, _| segment(&x))?;
    let kept = memory("VmRSS") - before;
    drop(plain);
    let before = memory("VmRSS");
    let through = (0..3).try_fold(x.as_tensor().clone(), |x, _| {
        train::checkpoint(move |x| segment(&x[0]), &[&x])
    })?;
    let kept_through = memory("VmRSS") - before;
    println!("kept: {kept:.0} MB, {kept_through:.0} MB through checkpoints");
    assert!(kept > 23.0 * MB && kept_through < 4.0 * MB);
    assert!(through.sum_all()?.backward()?.get(&x).is_some());
    Ok(())
}
