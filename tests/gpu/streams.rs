//! Order: kernels among candle's work, on its own stream, on several, and on two GPUs.

use candle_core::{DType, Device, Result, Tensor, Var};
use kaio_candle::prelude::*;
use kaio_candle::tune::FlashAttnBackward;

use super::suites::{Layout, Source, attention, matmul, poison, quantized};
use super::{gpu, say, second_gpu};

/// A result's elements in f32, bit for bit.
pub fn bits(t: &Tensor) -> Vec<u32> {
    let t = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A chain in which each step reads what the last one is still writing: candle, kaio, candle, kaio.
fn chain(device: &Device, seed: &str) -> Result<Vec<u32>> {
    let mut source = Source::new(seed, device);
    let n = 768;
    let x = source.tensor(DType::F32, &[n, n], Layout::Plain)?;
    let y = source.tensor(DType::F32, &[n, n], Layout::Plain)?;
    let opts = FlashAttnOptions::default().causal(true).deterministic(true);
    let mut state = x.clone();
    for _ in 0..4 {
        // candle writes `h`; kaio reads it at once.
        let h = (state.matmul(&y)? * (1.0 / n as f64))?.to_dtype(DType::F16)?;
        let c = h.kaio_matmul_tc_async(&h.t()?)?;
        // kaio wrote `c`; candle reads it at once, and `h` is freed while kaio may still read it.
        state = (c.tanh()? + &x)?;
        let heads = state.reshape((12, n, 64))?;
        let o = heads.kaio_flash_attn(&heads, &heads, true)?;
        state = (state + o.reshape((n, n))?)?;
        // The backward pass reads what the forward pass is still writing, and candle its gradient.
        let heads = Var::from_tensor(&state.tanh()?.reshape((12, n, 64))?.to_dtype(DType::BF16)?)?;
        let o = heads.kaio_flash_attn_with(&heads, &heads, &opts)?;
        let grads = o.sqr()?.backward()?;
        let grad = grads.get(&heads).expect("it tracks a gradient").detach();
        state = (state + grad.reshape((n, n))?.to_dtype(DType::F32)?.tanh()?)?;
    }
    Ok(bits(&state))
}

#[test]
fn own_stream_gives_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let want = chain(&gpu, "chain")?;
    let own = Device::new_cuda_with_stream(0)?;
    for _ in 0..8 {
        assert!(chain(&own, "chain")? == want, "the device with its own stream differs");
    }
    Ok(())
}

#[test]
fn tables_on_an_own_stream() -> Result<()> {
    if gpu().is_none() {
        return Ok(());
    }
    let own = Device::new_cuda_with_stream(0)?;
    matmul::layouts(&own);
    matmul::gradients(&own);
    quantized::int8(&own);
    quantized::int4(&own);
    quantized::qkv_int8(&own);
    attention::layouts(&own);
    attention::gradient_kinds(&own);
    attention::attention_tc(&own);
    Ok(())
}

#[test]
fn two_candle_devices_on_one_gpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let own = Device::new_cuda_with_stream(0)?;
    let mut source = Source::new("two devices", &gpu);
    let (a, b) = (
        source.tensor(DType::F16, &[256, 512], Layout::Plain)?,
        source.tensor(DType::F16, &[512, 256], Layout::Plain)?,
    );
    let want = bits(&a.kaio_matmul_tc(&b)?);
    let moved = Tensor::from_vec(b.flatten_all()?.to_vec1::<half::f16>()?, (512, 256), &own)?;
    for _ in 0..50 {
        assert!(bits(&a.kaio_matmul_tc(&moved)?) == want);
    }
    Ok(())
}

/// A weight of one candle device and activations of another: quantised, prepared and multiplied on the streams of each.
#[test]
fn a_weight_of_another_candle_device() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let own = Device::new_cuda_with_stream(0)?;
    let mut source = Source::new("a weight of another device", &Device::Cpu);
    let weight = source.tensor(DType::F32, &[256, 136], Layout::Plain)?;
    // Beyond f16, too.
    let large = (&weight * 1e6)?;
    let (int4, int8) = (
        QuantScheme::Int4 { group: 64, zero_points: true },
        QuantScheme::Int8 { per: Per::Channel },
    );
    for (scheme, weight) in [(int4, &weight), (int4, &large), (int8, &weight), (int8, &large)] {
        for (m, dtype) in [(1, DType::F16), (33, DType::F16), (33, DType::BF16)] {
            let x = source.tensor(dtype, &[m, 256], Layout::Plain)?;
            let opts = MatmulOptions::default().out_dtype(DType::F32);
            let product = |of_x: &Device, of_weight: &Device| {
                let w = QuantWeight::quantize(&weight.to_device(of_weight)?, &scheme)?;
                Ok::<_, candle_core::Error>(bits(
                    &x.to_device(of_x)?.kaio_matmul_quant_with(&w, &opts)?,
                ))
            };
            let want = product(&gpu, &gpu)?;
            for (of_x, of_weight) in [(&gpu, &own), (&own, &gpu), (&own, &own)] {
                assert!(product(of_x, of_weight)? == want, "{scheme:?}, {m} rows of {dtype:?}");
            }
        }
    }
    Ok(())
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

/// The same of attention and its gradients, whose kernels follow one another.
#[test]
fn gradients_on_streams_of_several_devices_are_ordered() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let own = [Device::new_cuda_with_stream(0)?, Device::new_cuda_with_stream(0)?];
    let (heads, rows, dim) = (8, 512, 128);
    // A long way to heads of attention, all of it on the device's stream.
    let late = |device: &Device, seed: &str| {
        let n = rows;
        let mut x = Source::new(seed, device).tensor(DType::F32, &[n, n], Layout::Plain)?;
        for _ in 0..20 {
            x = (x.matmul(&x)? * (3.0 / (n as f64).sqrt()))?.tanh()?;
        }
        let wide = Tensor::cat(&[&x, &x.t()?], 1)?.reshape((rows, heads, dim))?;
        wide.transpose(0, 1)?.to_dtype(DType::BF16)
    };
    let var = |t: Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(&t)?.into_inner());
    let gradients = |devices: [&Device; 3]| {
        let (q, grad) = (var(late(devices[0], "q")?)?, late(devices[0], "grad")?);
        let (k, v) = (var(late(devices[1], "k")?)?, var(late(devices[2], "v")?)?);
        let opts = FlashAttnOptions::default().causal(true).deterministic(true);
        let attention = FlashAttnBackward::new([&q, &k, &v], &opts)?;
        let gradients = attention.run(&grad)?;
        drop((q, k, v, grad, attention));
        // What was just freed is taken and overwritten.
        devices.iter().for_each(|device| poison(device, heads * rows * dim / 2));
        Ok::<_, candle_core::Error>(gradients.iter().flatten().map(bits).collect::<Vec<_>>())
    };
    let want = gradients([&gpu; 3])?;
    let [first, second] = &own;
    for _ in 0..3 {
        for devices in [[&gpu, first, second], [first, second, &gpu], [first, &gpu, first]] {
            assert!(gradients(devices)? == want, "devices {devices:?}");
        }
    }
    Ok(())
}

#[test]
fn two_gpus() -> Result<()> {
    let (Some(first), Some(second)) = (gpu(), second_gpu()) else { return Ok(()) };
    assert!(chain(&first, "two")? == chain(&second, "two")?, "two GPUs of one kind differ");
    let (a, b) = (registry::device(0)?, registry::device(1)?);
    assert_eq!((a.ordinal(), b.ordinal()), (0, 1));
    std::thread::scope(|scope| {
        for device in [&first, &second] {
            scope.spawn(move || matmul::sizes(device));
        }
    });
    say("two GPUs: ran");
    Ok(())
}
