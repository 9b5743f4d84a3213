//! What attention keeps for its backward pass, and what that allocates; what a quantised weight takes: the driver's own
//! count.

use candle_core::{DType, Device, Result, Tensor, Var};
use kaio_candle::prelude::*;
use kaio_candle::train::{peak_memory, reset_peak_memory};
use kaio_candle::tune::FlashAttnBackward;

use super::say;
use super::suites::{Layout, Source, results_alone};

/// Bytes of candle's memory on a device beyond those before something ran: at most while it ran, and after it.
struct Taken {
    most: u64,
    kept: u64,
}

/// What is in use once the device has come to all that was freed.
fn in_use(device: &Device) -> Result<u64> {
    reset_peak_memory(device)?;
    peak(device)
}

fn peak(device: &Device) -> Result<u64> {
    peak_memory(device)?.ok_or_else(|| candle_core::Error::msg("a GPU's memory is counted"))
}

fn measure<T>(device: &Device, run: impl FnOnce() -> Result<T>) -> Result<(T, Taken)> {
    let before = in_use(device)?;
    let result = run()?;
    device.synchronize()?;
    let most = peak(device)? - before;
    Ok((result, Taken { most, kept: in_use(device)? - before }))
}

fn bytes(t: &Tensor) -> u64 {
    (t.elem_count() * t.dtype().size_in_bytes()) as u64
}

/// B, Hq, Hkv, Sq, Sk, D.
type Sizes = [usize; 6];

/// Beyond inputs, results and gradients: two f32 rows a query from the forward pass on, and during the backward
/// pass a third one and an f32 accumulator of q's gradient.
///
/// In a process of its own, whose memory nobody else takes.
pub fn of_attention() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;

    // What is given back before the end counts, too.
    let zeros = || Tensor::zeros(1 << 20, DType::F32, &device);
    let (_, taken) = measure(&device, || zeros()?.to_dtype(DType::BF16).map(drop))?;
    assert!(taken.most >= 6 << 20 && taken.kept == 0, "{} and {}", taken.most, taken.kept);

    // The emulator takes a while.
    let shorter = if results_alone() { 8 } else { 1 };
    let cases: [(DType, Sizes, bool); 8] = [
        (DType::BF16, [1, 4, 4, 2048, 2048, 64], false),
        (DType::BF16, [2, 4, 4, 2048, 2048, 128], true),
        (DType::F16, [1, 8, 2, 2048, 2048, 128], true),
        (DType::BF16, [1, 2, 2, 2048, 2048, 256], true),
        (DType::BF16, [1, 4, 4, 512, 4096, 128], false),
        (DType::BF16, [1, 4, 4, 4096, 512, 96], false),
        (DType::F32, [1, 4, 4, 2048, 2048, 64], true),
        (DType::F32, [1, 4, 2, 2048, 2048, 128], false),
    ];
    for (dtype, sizes @ [b, h, hkv, sq, sk, d], causal) in cases {
        let (sq, sk) = (sq / shorter, sk / shorter);
        for deterministic in [false, true] {
            let case =
                format!("{dtype:?} {sizes:?}, causal {causal}, deterministic {deterministic}");
            let mut source = Source::new(&case, &device);
            let mut input = |dims: [usize; 4]| source.tensor(dtype, &dims, Layout::Plain);
            let grad = input([b, h, sq, d])?;
            let mut var = |heads, rows| {
                Ok::<_, candle_core::Error>(
                    Var::from_tensor(&input([b, heads, rows, d])?)?.into_inner(),
                )
            };
            let [q, k, v] = [var(h, sq)?, var(hkv, sk)?, var(hkv, sk)?];
            let opts = FlashAttnOptions::default().causal(causal).deterministic(deterministic);
            let forward = || FlashAttnBackward::new([&q, &k, &v], &opts);
            // Compiles the kernels.
            forward()?.run(&grad)?;

            let row = (b * h * sq * 4) as u64;
            let accumulator = row * d as u64;
            // What does not grow with the problem, and what allocations are rounded up by.
            let constant = 4 << 10;
            let (attention, saved) = measure(&device, forward)?;
            let saved = saved.kept - bytes(attention.out());
            assert!(
                saved <= 2 * row + constant,
                "{case}: the forward pass saves {saved}, a row is {row}"
            );
            let (gradients, taken) = measure(&device, || attention.run(&grad))?;
            let results: u64 = gradients.iter().flatten().map(bytes).sum();
            assert!(taken.kept >= results, "{case}: {} of gradients, {}", results, taken.kept);
            let beyond = taken.most - results;
            let allowed = accumulator + row + constant;
            assert!(
                beyond <= allowed,
                "{case}: the backward pass takes {beyond} beyond its gradients, allowed {allowed}"
            );
            let kept = taken.kept - results;
            assert!(kept <= constant, "{case}: {kept} are kept with the gradients");
        }
    }
    say(&format!("suite attention memory: {} ran", 2 * cases.len()));
    Ok(())
}

/// A prepared weight takes its codes, scales and zero points, and nothing is left of what it was made of: the codes and zero
/// points of the file, in another order.
///
/// In a process of its own, whose memory nobody else takes.
pub fn of_weights() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;
    let schemes = [
        QuantScheme::Int4 { group: 128, zero_points: false },
        QuantScheme::Int4 { group: 64, zero_points: true },
        QuantScheme::Nf4 { block: 64 },
        QuantScheme::Int8 { per: Per::Channel },
    ];
    let (k, n) = (1024, 768);
    for scheme in schemes {
        let mut source = Source::new(&format!("{scheme:?}"), &Device::Cpu);
        let w = source.tensor(DType::F16, &[k, n], Layout::Plain)?;
        let host = QuantWeight::quantize(&w, &scheme)?;
        // Compiles the kernels.
        host.to_device(&device)?.prepare()?;
        let (weight, taken) = measure(&device, || {
            let weight = host.to_device(&device)?;
            weight.prepare()?;
            Ok(weight)
        })?;
        // What allocations are rounded up by.
        let constant = 4 << 10;
        let own = weight.bytes() as u64;
        assert!(taken.kept <= own + constant, "{scheme:?}: {} are kept, {own} its own", taken.kept);
        assert_eq!(own, host.bytes() as u64, "{scheme:?}");
        let codes = if matches!(scheme, QuantScheme::Int8 { .. }) { k * n } else { k * n / 2 };
        let zeros = match scheme {
            QuantScheme::Int4 { group, zero_points: true } => k / group as usize * n,
            _ => 0,
        };
        let allowed = own + (codes + zeros) as u64 + constant;
        assert!(taken.most <= allowed, "{scheme:?}: {} at most, {own} its own", taken.most);
        // A view of a large matrix does not keep it.
        if let QuantScheme::Int8 { .. } = scheme {
            let (part, taken) = measure(&device, || {
                let codes = Tensor::zeros((8 * k, n), DType::U8, &device)?;
                let scale = Tensor::ones(1, DType::F32, &device)?;
                QuantWeight::from_int8(&codes.narrow(0, k, k)?, &scale)
            })?;
            let own = part.bytes() as u64;
            assert!(taken.kept <= own + constant, "{} are kept, {own} its own", taken.kept);
        }
    }
    say(&format!("suite memory of weights: {} ran", schemes.len()));
    Ok(())
}
